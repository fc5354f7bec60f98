"""What a step costs on a CPU, and from how many keys on a search pays there."""

from __future__ import annotations

import math

from hashattn.core.threads import thread_count
from hashattn.engines.base import Request
from hashattn.engines.parts import Parts

SOURCE = "benchmarks/results/bench_cpu*.json"

# What a step costs on a CPU, fitted to benchmarks/results/bench_cpu*.json: microseconds a call, nanoseconds for each
# planes of codes compared with a key, for each further pass over a matrix of distances and for each number gathered
# (which costs a miss more than its bytes), and bytes a microsecond that dense attention reads.
_CALL, _PAIR, _PASS, _GATHER = 220.0, 0.84, 12.0, 0.34
_STREAM, _STREAM_16 = 11_500.0, 8_500.0
_ESTIMATE = 1.6  # a gathered key costs so much more where logits are estimated from codes
_MARGIN = 0.85  # "auto" searches where this share of dense attention's time is not exceeded
_LARGEST = 1 << 24


def crossover(parts: Parts, request: Request, compiled: bool = False) -> int | None:
    """Visible keys from which a search is clearly faster than dense attention; None if it never is."""
    low, high = 1, _LARGEST
    if not pays(parts, request, high):
        return None
    while low < high:
        middle = (low + high) // 2
        if pays(parts, request, middle):
            high = middle
        else:
            low = middle + 1
    return low


def pays(parts: Parts, request: Request, keys: int) -> bool:
    """Whether a search over so many keys is expected to be clearly faster than dense attention."""
    dense, step = step_microseconds(parts, request, keys)
    return step <= _MARGIN * dense


def step_microseconds(parts: Parts, request: Request, keys: int) -> tuple[float, float]:
    """Expected time of dense attention and of a search, over so many keys, in memory that is not in a cache."""
    selector, threads = parts.selector, thread_count(request.threads)
    assert selector is not None
    heads, times = selector.choices(request.q_heads, request.kv_heads)
    kept = min(keys, times * selector.budget(keys))
    gathered = request.batch * heads * kept * 2 * request.head_dim * (_ESTIMATE if parts.attend.needs_norms else 1)
    gathered += request.batch * heads * min(keys, times * selector.keys_read(keys)) * request.head_dim
    scans = passes = 0.0
    if selector.ranked and parts.encoder is not None:
        group, planes = request.group, parts.encoder.query_bits
        per_head = math.ceil(math.log2(group * (2**planes - 1) + 1)) if heads == request.kv_heads else group * planes
        words = -(-parts.encoder.bits // 64)
        scans = request.batch * request.kv_heads * per_head * keys * max(1, words) / 2
        passes = request.batch * request.q_heads * keys * selector.matrices
    stream = _STREAM if request.dtype.itemsize >= 4 else _STREAM_16  # 16-bit types are converted as it goes
    dense = keys * request.key_bytes / stream / threads
    return dense, _CALL + (scans * _PAIR + passes * _PASS + gathered * _GATHER / threads) / 1000
