"""Search on the CPU: a few heads' distances are scanned, and searched while they are in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hashattn.ops.hamming.cpu import as_bytes, hammings, merge_planes, sum_planes, weighted_distances
from hashattn.ops.nearest.cpu import IntArray, Table, force, select, shift
from hashattn.ops.scratch import borrow
from hashattn.threads import ahead, thread_count

_AT_ONCE = 1 << 17  # distances held at a time: half a megabyte
_WORTH_A_THREAD = 1 << 17  # keys from which a second thread pays: the interpreter changes hands at every call


def search(
    query: Tensor, codes: Tensor, counts: Table, spans: Table, *, shared: bool = False, sinks: int = 0,
    recents: int = 0, radius: int | None = None, threads: int | None = None,
) -> Tensor:  # fmt: skip
    """The keys that :func:`reference.search` finds, for tensors on the CPU.

    Heads of codes are independent. With several threads, and where there are many keys, the others scan ahead while
    this one selects: FAISS leaves the interpreter alone meanwhile, numpy's many short calls do not.

    Args:
        counts: [B][T], ascending numbers: how many keys a query wants, first of all and in all.
        spans: [B][T], (first, end): the columns that it sees.
        threads: at most this many; torch.get_num_threads() by default.

    Returns:
        int32 [B, heads, T, K], K the largest number of keys that a query keeps, at least 1.

    Raises:
        ValueError: threads below 1.
    """
    threads = thread_count(threads)
    batch, heads, keys, _ = codes.shape
    rows, weights = query_rows(query, heads, shared)  # uint8 [B, Hc, R * T * P, bytes]
    tokens, each = query.shape[2], rows.shape[2] // len(weights)  # R * T
    top = 64 * codes.shape[3] * sum(weights)  # no distance is larger
    held = as_bytes(codes)
    found: list[tuple[int, slice, int, IntArray]] = []
    few = max(1, _AT_ONCE // (keys * each))
    parts = [(b, slice(h, min(heads, h + few))) for b in range(batch) for h in range(0, heads, few)]
    ranges = [(min(first for first, _ in row), max(end for _, end in row)) for row in spans]
    parts = [(b, part) for b, part in parts if ranges[b][0] < ranges[b][1]]

    def scanned() -> Iterator[IntArray]:
        """int32 [h, R * T, n] for each part, good until the next."""
        for b, part in parts:
            low, high = ranges[b]
            distances = borrow("distances", (part.stop - part.start, each, high - low), np.int32)
            weighted_distances(rows[b, part], weights, held[b, part, low:high], distances)
            yield distances

    def scanned_ahead() -> Iterator[IntArray]:
        sizes = [(part.stop - part.start, rows.shape[2], ranges[b][1] - ranges[b][0]) for b, part in parts]
        room = max(map(np.prod, sizes), default=0)
        buffers = [borrow(f"ahead {i}", (int(room),), np.int32) for i in range(threads + 1)]

        def scan(i: int) -> IntArray:
            (b, part), (low, high) = parts[i], ranges[parts[i][0]]
            planes = buffers[i % len(buffers)][: np.prod(sizes[i])].reshape(sizes[i])
            codes = held[b, part, low:high]
            hammings(rows[b, part], codes if codes[0].flags.c_contiguous else np.ascontiguousarray(codes), planes)
            return planes

        for planes in ahead(scan, len(parts), threads):
            if len(weights) == 1:
                yield planes
            else:
                distances = borrow("distances", (len(planes), each, planes.shape[2]), np.int32)
                sum_planes(planes.reshape(len(planes), each, len(weights), -1), weights, distances)
                yield distances

    several = threads > 1 and keys >= _WORTH_A_THREAD and len(parts) > 1
    for (b, part), distances in zip(parts, scanned_ahead() if several else scanned(), strict=True):
        low = ranges[b][0]
        for t, (first, end) in enumerate(spans[b]):
            if first < end:
                row: IntArray = distances[:, t::tokens, first - low : end - low].reshape(-1, end - first)
                if sinks or recents:
                    row = force(row.copy() if tokens > 1 else row, sinks, recents, -1)
                columns = select(row, counts[b][t], None if radius is None else row <= radius, top=top)
                found.append((b, part, t, shift(columns, first)))
    slots = max((columns.shape[1] for *_, columns in found), default=0)
    ids = np.full((batch, heads, each // tokens, tokens, max(1, slots)), -1, np.int32)
    for b, part, t, columns in found:
        target = ids[b, part, :, t, : columns.shape[1]]
        target[:] = columns.reshape(target.shape)
    return torch.from_numpy(ids.reshape(batch, -1, tokens, ids.shape[-1]))


def query_rows(query: Tensor, heads: int, shared: bool) -> tuple[IntArray, list[int]]:
    """The planes that each head of codes is scanned with, uint8 [B, Hc, R * T * P, bytes], and the planes' weights.

    R is G, or 1 where the group makes one choice.
    """
    batch, q_heads, tokens = query.shape[:3]
    words, group = query.shape[-1], q_heads // heads
    planes = query.numpy().reshape(batch, heads, group, tokens, -1, words)
    n_planes = planes.shape[4]
    if not shared:
        rows = np.ascontiguousarray(planes[..., ::-1, :]).view(np.uint8)
        return rows.reshape(batch, heads, -1, 8 * words), [1 << j for j in reversed(range(n_planes))]
    size, whole = (
        batch * heads * tokens * words * 8,
        planes.transpose(2, 4, 0, 1, 3, 5).tobytes(),
    )  # [G, b, B, Hc, T, W]
    numbers = [int.from_bytes(whole[i : i + size], "little") for i in range(0, len(whole), size)]
    merged = merge_planes([(1 << i % n_planes, number) for i, number in enumerate(numbers)])
    rows = np.frombuffer(b"".join(number.to_bytes(size, "little") for _, number in merged), np.uint8)
    rows = rows.reshape(len(merged), batch, heads, tokens, 8 * words).transpose(1, 2, 3, 0, 4)
    return np.ascontiguousarray(rows).reshape(batch, heads, -1, 8 * words), [weight for weight, _ in merged]
