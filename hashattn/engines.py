"""Which engine serves a step, and from how many keys on a search is worth it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hashattn.threads import thread_count

if TYPE_CHECKING:
    from hashattn.attention import HashAttention
    from hashattn.selectors import Selector

# What a step costs on a CPU, fitted to benchmarks/results/bench_cpu*.json: microseconds a call, nanoseconds for each
# planes of codes compared with a key, for each further pass over a matrix of distances and for each number gathered
# (which costs a miss more than its bytes), and bytes a microsecond that dense attention reads.
_CALL, _PAIR, _PASS, _GATHER = 220.0, 0.84, 12.0, 0.34
_STREAM, _STREAM_16 = 11_500.0, 8_500.0
_ESTIMATE = 1.6  # a gathered key costs so much more where logits are estimated from codes
_MARGIN = 0.85  # "auto" searches where this share of dense attention's time is not exceeded
_LARGEST = 1 << 24


@dataclass(frozen=True)
class Shape:
    """What a step's cost depends on beside the number of keys."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    itemsize: int


def resolve(attn: HashAttention, device: str, visible: int, least: int | None) -> str:
    """The engine for a step over `visible` keys on this kind of device: "dense", "reference" or "cpu".

    Args:
        least: from :func:`crossover`, for engine="auto".

    Raises:
        ValueError: engine="cpu" for tensors on another device.
    """
    if not attn.attend.needs_selection or attn.engine == "dense":
        return "dense"
    if attn.engine == "cpu" and device != "cpu":
        raise ValueError(f'engine="cpu" needs tensors on the CPU, got {device}; engine="reference" runs anywhere')
    if attn.engine != "auto":
        return attn.engine
    return "dense" if least is None or visible < least else "cpu"


def crossover(attn: HashAttention, device: str, shape: Shape, threads: int | None = None) -> int | None:
    """Visible keys from which engine="auto" searches on this kind of device; None if it never does.

    Plain PyTorch on CUDA did not win at any length (benchmarks/results/decode_step_h200.json), so there it never does.
    """
    if device != "cpu" or not attn.attend.needs_selection or attn.selector is None:
        return None
    if attn.encoder is not None and attn.encoder.code != "binary":
        return None  # scores of floats read as much as dense attention does
    low, high = 1, _LARGEST
    if not pays(attn, shape, high, threads):
        return None
    while low < high:
        middle = (low + high) // 2
        if pays(attn, shape, middle, threads):
            high = middle
        else:
            low = middle + 1
    return low


def pays(attn: HashAttention, shape: Shape, keys: int, threads: int | None = None) -> bool:
    """Whether a search over so many keys is expected to be clearly faster than dense attention on a CPU."""
    dense, step = step_microseconds(attn, shape, keys, thread_count(threads))
    return step <= _MARGIN * dense


def step_microseconds(attn: HashAttention, shape: Shape, keys: int, threads: int) -> tuple[float, float]:
    """Expected time of dense attention and of a search, over so many keys, in memory that is not in a cache."""
    selector = attn.selector
    assert selector is not None
    heads, times = choices(selector, shape.q_heads, shape.kv_heads)
    kept = min(keys, times * selector.budget(keys))
    gathered = shape.batch * heads * kept * 2 * shape.head_dim * (_ESTIMATE if attn.attend.needs_norms else 1)
    scans = passes = 0.0
    if selector.ranked and attn.encoder is not None:
        group = shape.q_heads // shape.kv_heads
        planes = attn.encoder.query_bits
        per_head = math.ceil(math.log2(group * (2**planes - 1) + 1)) if heads == shape.kv_heads else group * planes
        words = -(-attn.encoder.bits // 64)
        scans = shape.batch * shape.kv_heads * per_head * keys * max(1, words) / 2
        passes = shape.batch * shape.q_heads * keys * selector.matrices
    stream = _STREAM if shape.itemsize >= 4 else _STREAM_16  # 16-bit types are converted as it goes
    dense = 2 * shape.batch * shape.kv_heads * keys * shape.head_dim * shape.itemsize / stream / threads
    return dense, _CALL + (scans * _PAIR + passes * _PASS + gathered * _GATHER / threads) / 1000


def choices(selector: Selector, q_heads: int, kv_heads: int) -> tuple[int, int]:
    """(choices made, keys of each as a multiple of the budget, at most): the heads of a KV head may share one."""
    if not selector.ranked:
        return kv_heads, 1
    part: object = selector
    while not hasattr(part, "per"):  # through Joined and the calibrations
        inner = getattr(part, "ranked_part", None) or getattr(part, "inner", None)
        if inner is None:
            return q_heads, 1
        part = inner
    if getattr(part, "per", None) != "kv_head":
        return q_heads, 1
    return kv_heads, q_heads // kv_heads if getattr(part, "combine", None) == "union" else 1
