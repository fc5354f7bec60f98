"""Search on the CPU: a few heads' distances are scanned, and searched while they are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hashattn.ops.hamming.cpu import as_bytes, merge_planes, weighted_distances
from hashattn.ops.nearest.cpu import IntArray, Table, empty_slots, fill, force, select
from hashattn.ops.scratch import borrow

T = TypeVar("T")

_AT_ONCE = 1 << 17  # distances held at a time: half a megabyte
_WORTH_A_THREAD = 1 << 17  # keys from which it pays: numpy and FAISS hand the interpreter over at every call


def search(
    query: Tensor, codes: Tensor, counts: Table, spans: Table, *, shared: bool = False, sinks: int = 0,
    recents: int = 0, radius: int | None = None, threads: int | None = None,
) -> Tensor:  # fmt: skip
    """The keys that :func:`reference.search` finds, for tensors on the CPU.

    Heads of codes are independent and are spread over threads; FAISS and numpy release the interpreter meanwhile.

    Args:
        counts: [B][T], ascending numbers: how many keys a query wants, first of all and in all.
        spans: [B][T], (first, end): the columns that it sees.
        threads: at most this many; torch.get_num_threads() by default.

    Returns:
        int32 [B, heads, T, K], K the largest count.

    Raises:
        ValueError: threads below 1.
    """
    threads = check_threads(torch.get_num_threads() if threads is None else threads)
    batch, heads, keys, _ = codes.shape
    rows, weights = query_rows(query, heads, shared)  # uint8 [B, Hc, R, T, P, bytes]
    group, tokens = rows.shape[2:4]
    ids = empty_slots(batch, heads * group, tokens, counts)
    slots, held = ids.reshape(batch, heads, group, tokens, -1), as_bytes(codes)

    def some(parts: Sequence[tuple[int, slice]]) -> None:
        for b, part in parts:
            low, high = min(first for first, _ in spans[b]), max(end for _, end in spans[b])
            if low >= high:
                continue
            queries = rows[b, part].reshape(part.stop - part.start, group * tokens, len(weights), -1)
            flat = borrow("distances", (len(queries), group * tokens, high - low), np.int32)
            weighted_distances(queries, weights, held[b, part, low:high], flat)
            found = flat.reshape(-1, group, tokens, high - low)
            for t, (first, end) in enumerate(spans[b]):
                if first < end:
                    row = found[:, :, t, first - low : end - low].reshape(-1, end - first)
                    if sinks or recents:
                        row = force(row.copy() if tokens > 1 else row, sinks, recents, -1)
                    columns = select(row, counts[b][t], None if radius is None else row <= radius)
                    target = np.full((len(row), ids.shape[-1]), -1, np.int32)
                    fill(target, columns, first)
                    slots[b, part, :, t] = target.reshape(-1, group, ids.shape[-1])

    few = max(1, _AT_ONCE // (keys * group * tokens))
    parts = [(b, slice(h, min(heads, h + few))) for b in range(batch) for h in range(0, heads, few)]
    in_threads(some, parts, threads if keys >= _WORTH_A_THREAD else 1)
    return torch.from_numpy(ids)


def query_rows(query: Tensor, heads: int, shared: bool) -> tuple[IntArray, list[int]]:
    """The planes that each head of codes is scanned with, uint8 [B, Hc, R, T, P, bytes], and the planes' weights.

    R is G, or 1 where the group makes one choice.
    """
    batch, q_heads, tokens = query.shape[:3]
    grouped = query.numpy().reshape(batch, heads, q_heads // heads, tokens, -1, query.shape[-1])
    pairs = [(1 << j, grouped[..., j, :]) for j in range(grouped.shape[-2])]
    if shared:
        pairs = merge_planes([(w, plane[:, :, g : g + 1]) for w, plane in pairs for g in range(grouped.shape[2])])
    else:
        pairs.reverse()
    return np.stack([plane for _, plane in pairs], axis=-2).view(np.uint8), [w for w, _ in pairs]


def check_threads(threads: int) -> int:
    """Raise unless this is a number of threads."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be an int of at least 1, got {threads!r}")
    return threads


def in_threads(some: Callable[[Sequence[T]], None], work: Sequence[T], threads: int) -> None:
    """Call with all of the work, in as many parts as there are threads."""
    threads = min(threads, len(work))
    jobs = [_pool(threads - 1).submit(some, work[i::threads]) for i in range(1, threads)]
    some(work[::threads])
    for job in jobs:
        job.result()


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="hashattn")
