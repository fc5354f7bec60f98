"""Which engine serves a step, and from how many keys on a search is worth it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hashattn.core.threads import thread_count
from hashattn.engines.gpus import this_gpu

if TYPE_CHECKING:
    from hashattn.attention import HashAttention

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

    @property
    def key_bytes(self) -> int:
        """Of a key and its value, in all sequences and KV heads."""
        return 2 * self.batch * self.kv_heads * self.head_dim * self.itemsize


def resolve(attn: HashAttention, device: str, visible: int, least: int | None, unfused: str | None) -> str:
    """The engine for a step over `visible` keys on this kind of device: "dense", "reference", "cpu" or "triton".

    Args:
        least: from :func:`crossover`, for engine="auto".
        unfused: why engine="triton" does not serve it, from :func:`hashattn.engines.gpu.why_not`.

    Raises:
        ValueError: engine="cpu" for tensors on another device, or engine="triton" for a step that it does not serve.
    """
    if not attn.attend.needs_selection or attn.engine == "dense":
        return "dense"
    if attn.engine == "cpu" and device != "cpu":
        raise ValueError(f'engine="cpu" needs tensors on the CPU, got {device}; engine="reference" runs anywhere')
    if attn.engine == "triton" and unfused is not None:
        raise ValueError(f'engine="triton" cannot take this step: {unfused}; engine="reference" or "auto" can')
    if attn.engine != "auto":
        return attn.engine
    if least is None or visible < least:
        return "dense"
    return "triton" if device == "cuda" else "cpu"


def crossover(
    attn: HashAttention, device: str | torch.device, shape: Shape, threads: int | None = None
) -> int | None:  # fmt: skip
    """Visible keys from which engine="auto" searches on this device; None if it never does.

    On CUDA it holds for steps that engine="triton" serves, launched from Python (hashattn/engines/gpus.py). Plain
    PyTorch did not win there at any length (benchmarks/results/decode_step_h200.json).
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda") or not attn.attend.needs_selection or attn.selector is None:
        return None
    if device.type == "cuda":
        found = this_gpu(device)
        return None if found is None else found[1].keys(shape.key_bytes)
    if attn.encoder is not None and not (attn.index is not None and attn.index.flat_codes):
        return None  # of the others no cost is known; scores of floats read as much as dense attention does
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


def provenance(device: str | torch.device, shape: Shape) -> str:
    """Where :func:`crossover` has its figures from, and on a GPU from where on a captured step wins; "" if it has none.

    Whether a step is captured is for who captures it to say: "auto" cannot know.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "benchmarks/results/bench_cpu*.json"
    found = this_gpu(device) if device.type == "cuda" else None
    if found is None:
        return ""
    name, gpu = found
    return (
        f"{name}, {gpu.source}; in a CUDA graph a step wins from {gpu.keys(shape.key_bytes, captured=True):,} keys on"
    )


def pays(attn: HashAttention, shape: Shape, keys: int, threads: int | None = None) -> bool:
    """Whether a search over so many keys is expected to be clearly faster than dense attention on a CPU."""
    dense, step = step_microseconds(attn, shape, keys, thread_count(threads))
    return step <= _MARGIN * dense


def step_microseconds(attn: HashAttention, shape: Shape, keys: int, threads: int) -> tuple[float, float]:
    """Expected time of dense attention and of a search, over so many keys, in memory that is not in a cache."""
    selector = attn.selector
    assert selector is not None
    heads, times = selector.choices(shape.q_heads, shape.kv_heads)
    kept = min(keys, times * selector.budget(keys))
    gathered = shape.batch * heads * kept * 2 * shape.head_dim * (_ESTIMATE if attn.attend.needs_norms else 1)
    gathered += shape.batch * heads * min(keys, times * selector.looked_at(keys)) * shape.head_dim
    scans = passes = 0.0
    if selector.ranked and attn.encoder is not None:
        group = shape.q_heads // shape.kv_heads
        planes = attn.encoder.query_bits
        per_head = math.ceil(math.log2(group * (2**planes - 1) + 1)) if heads == shape.kv_heads else group * planes
        words = -(-attn.encoder.bits // 64)
        scans = shape.batch * shape.kv_heads * per_head * keys * max(1, words) / 2
        passes = shape.batch * shape.q_heads * keys * selector.matrices
    stream = _STREAM if shape.itemsize >= 4 else _STREAM_16  # 16-bit types are converted as it goes
    dense = keys * shape.key_bytes / stream / threads
    return dense, _CALL + (scans * _PAIR + passes * _PASS + gathered * _GATHER / threads) / 1000
