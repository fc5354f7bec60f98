"""Scanning on the CPU: the distances of a few heads at a time, which a cache still holds when they are searched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from hashattn.core.types import Table
from hashattn.ops.hamming.cpu import add_bias, as_bytes, merge_planes, weighted_distances
from hashattn.ops.nearest.cpu import IntArray
from hashattn.ops.scratch import borrow

AT_ONCE = 1 << 17  # distances held at a time: half a megabyte


def scanned(
    query: Tensor, codes: Tensor, spans: Table, shared: bool, biased: bool = False
) -> Iterator[tuple[int, slice, int, IntArray]]:
    """Some heads of one row after the other; see :func:`hashattn.ops.search.reference.search` for the arguments.

    Yields:
        the row, its heads, the first column that any query of the row sees, and the distances from there to the last
        one: int32 [h, R * T, n], good until the next; R is G, or 1 where the group makes one choice.
    """
    heads, keys = codes.shape[1:3]
    planes, weights = query_planes(query, heads, shared)
    held, queries = as_bytes(codes), planes.shape[2] // len(weights)
    few = max(1, AT_ONCE // (keys * queries))
    for b, row in enumerate(spans):
        low, high = min(first for first, _ in row), max(end for _, end in row)
        if low >= high:
            continue
        for h in range(0, heads, few):
            part = slice(h, min(heads, h + few))
            distances = borrow("distances", (part.stop - h, queries, high - low), np.int32)
            weighted_distances(planes[b, part], weights, held[b, part, low:high], distances)
            if biased:
                add_bias(held[b, part, low:high], distances, query.shape[1] // heads if shared else 1)
            yield b, part, low, distances


def query_planes(query: Tensor, heads: int, shared: bool) -> tuple[IntArray, list[int]]:
    """The planes that each head of codes is scanned with, uint8 [B, Hc, R * T * P, bytes], and their weights."""
    batch, q_heads, tokens = query.shape[:3]
    words, group = query.shape[-1], q_heads // heads
    planes = query.numpy().reshape(batch, heads, group, tokens, -1, words)
    count = planes.shape[4]
    if not shared:
        rows = np.ascontiguousarray(planes[..., ::-1, :]).view(np.uint8)
        return rows.reshape(batch, heads, -1, 8 * words), [1 << j for j in reversed(range(count))]
    size = batch * heads * tokens * words * 8
    whole = planes.transpose(2, 4, 0, 1, 3, 5).tobytes()  # [G, b, B, Hc, T, W]
    numbers = [int.from_bytes(whole[i : i + size], "little") for i in range(0, len(whole), size)]
    merged = merge_planes([(1 << i % count, number) for i, number in enumerate(numbers)])
    rows = np.frombuffer(b"".join(number.to_bytes(size, "little") for _, number in merged), np.uint8)
    rows = rows.reshape(len(merged), batch, heads, tokens, 8 * words).transpose(1, 2, 3, 0, 4)
    return np.ascontiguousarray(rows).reshape(batch, heads, -1, 8 * words), [weight for weight, _ in merged]
