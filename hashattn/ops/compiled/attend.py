"""Attention to chosen rows: products, softmax and the weighted sum, each row fetched ahead."""

from __future__ import annotations

from typing import Any

import numpy as np

from hashattn.ops.compiled.jit import from_bits, inlined, number, prefetch, to_bits

AHEAD = 16  # rows fetched ahead


@inlined
def exponential(x: Any) -> Any:
    """e^x of a float32 that is not above zero, to 2e-7; NaN for NaN."""
    y = max(x * np.float32(1.44269504088896341), np.float32(-126.0))
    whole = np.floor(y)
    f = y - whole
    p = np.float32(1.8775767e-3)
    p = p * f + np.float32(8.9893397e-3)
    p = p * f + np.float32(5.5826318e-2)
    p = p * f + np.float32(2.4015361e-1)
    p = p * f + np.float32(6.9315308e-1)
    p = p * f + np.float32(9.9999994e-1)
    e = from_bits(np.uint32(np.int32(to_bits(p)) + (np.int32(whole) << np.int32(23))))
    e = np.float32(0.0) if x < np.float32(-87.0) else e
    return e if x == x else x


@inlined
def fetch(rows: Any, at: np.uint64, dim: int, line: int) -> None:
    """Fetch a row of so many numbers ahead."""
    for x in range(0, dim, line):
        prefetch(rows, np.int64(at) + x)


@inlined
def products(q: Any, group: int, dim: int, keys: Any, ids: Any, count: int, logits: Any) -> None:
    """Products of a group's queries, float32 [group * dim], with the first `count` keys at ids."""
    line, wide, n = 64 // keys.itemsize, np.uint64(dim), 0
    while n + 4 <= count:
        if n + AHEAD + 4 <= count:
            for j in range(4):
                fetch(keys, np.uint64(ids[n + AHEAD + j]) * wide, dim, line)
        a, b = np.uint64(ids[n]) * wide, np.uint64(ids[n + 1]) * wide
        c, d = np.uint64(ids[n + 2]) * wide, np.uint64(ids[n + 3]) * wide
        for g in range(group):
            at = np.uint64(g) * wide
            p, r, s, t = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for x in range(wide):
                z = q[at + x]
                p += z * number(keys[a + x])
                r += z * number(keys[b + x])
                s += z * number(keys[c + x])
                t += z * number(keys[d + x])
            logits[g, n], logits[g, n + 1], logits[g, n + 2], logits[g, n + 3] = p, r, s, t
        n += 4
    while n < count:
        a = np.uint64(ids[n]) * wide
        for g in range(group):
            at, p = np.uint64(g) * wide, np.float32(0)
            for x in range(wide):
                p += q[at + x] * number(keys[a + x])
            logits[g, n] = p
        n += 1


@inlined
def softmax(logits: Any, count: int) -> Any:
    """Weights from a row's logits, in place. Returns the log of the sum of their exponentials."""
    peak = np.float32(-np.inf)
    for n in range(count):
        peak = max(peak, logits[n])
    total = np.float32(0)
    for n in range(count):
        e = exponential(logits[n] - peak)
        logits[n] = e
        total += e
    scale = np.float32(1) / total
    for n in range(count):
        logits[n] *= scale
    return peak + np.log(total)


@inlined
def weighted(weights: Any, group: int, dim: int, values: Any, ids: Any, count: int, sums: Any) -> None:
    """Sums of the values at ids, float32 [group * dim], by weights [group, count]."""
    line, wide, n = 64 // values.itemsize, np.uint64(dim), 0
    sums[: group * dim] = np.float32(0)
    while n + 4 <= count:
        if n + AHEAD + 4 <= count:
            for j in range(4):
                fetch(values, np.uint64(ids[n + AHEAD + j]) * wide, dim, line)
        a, b = np.uint64(ids[n]) * wide, np.uint64(ids[n + 1]) * wide
        c, d = np.uint64(ids[n + 2]) * wide, np.uint64(ids[n + 3]) * wide
        for g in range(group):
            p, r, s, t = weights[g, n], weights[g, n + 1], weights[g, n + 2], weights[g, n + 3]
            out = sums[g * dim : (g + 1) * dim]
            for x in range(wide):
                out[x] += (
                    p * number(values[a + x])
                    + r * number(values[b + x])
                    + s * number(values[c + x])
                    + t * number(values[d + x])
                )
        n += 4
    while n < count:
        a = np.uint64(ids[n]) * wide
        for g in range(group):
            p, out = weights[g, n], sums[g * dim : (g + 1) * dim]
            for x in range(wide):
                out[x] += p * number(values[a + x])
        n += 1
