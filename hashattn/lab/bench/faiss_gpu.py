"""FAISS's exact binary search on a GPU, as a decode step would call it: queries and results stay on the device."""

from __future__ import annotations

import time
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hashattn.core.extras import require
from hashattn.lab.bench.cuda_inputs import GpuLayer

TEMPORARY = 256 << 20  # bytes that FAISS sets aside once, instead of allocating at every search


def faiss_us(layer: GpuLayer, k: int, rounds: int) -> float:
    """Median microseconds of one layer's search: an index per sequence and KV head, which its group's queries share.

    FAISS cannot be captured in a graph, so that what its host does between the searches counts; nothing is copied.

    Raises:
        ImportError: FAISS is missing, or knows no GPU.
        RuntimeError: FAISS refuses the search, or finds other keys.
    """
    faiss = require("faiss", "gpu", "the comparison with FAISS")
    if not hasattr(faiss, "GpuIndexBinaryFlat"):
        raise ImportError(f"FAISS {faiss.__version__} has no GPU indexes; faiss-gpu has, without faiss-cpu beside it")
    device = torch.cuda.current_device()
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(TEMPORARY)
    stream = torch.cuda.current_stream().cuda_stream
    resources.setDefaultStream(device, faiss.cast_integer_to_cudastream_t(stream))
    config = faiss.GpuIndexBinaryFlatConfig()
    config.device = device
    codes = layer.codes.flatten(0, 1)
    queries = layer.query[0][:, :, 0, 0].unflatten(1, (layer.codes.shape[1], -1)).flatten(0, 1).contiguous()
    indexes = []
    for own in codes:
        index = faiss.GpuIndexBinaryFlat(resources, 64 * codes.shape[-1], config)
        index.add(own.cpu().view(torch.uint8).numpy())
        indexes.append(index)
    found = [results(query, k) for query in queries]
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for index, query, (distances, ids) in zip(indexes, queries, found, strict=True):
            search(faiss, index, query, distances, ids)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e6)
    check(codes[0], queries[0], *found[0])
    return median(times[1:])  # the first allocates


def results(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Memory for what a search finds: distances int32 and ids int64, [n, k]."""
    shape = (len(query), k)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape, dtype=torch.int64)


def search(faiss: ModuleType, index: Any, query: Tensor, distances: Tensor, ids: Tensor) -> None:
    """Search an index of binary codes for queries, int64 [n, W], in memory that the index can read; see results()."""
    asked = faiss.cast_integer_to_uint8_ptr(query.data_ptr())
    written = faiss.cast_integer_to_int_ptr(distances.data_ptr()), faiss.cast_integer_to_idx_t_ptr(ids.data_ptr())
    index.search_c(len(query), asked, distances.shape[1], *written)


def check(codes: Tensor, query: Tensor, distances: Tensor, ids: Tensor) -> None:
    """Raise RuntimeError unless the distances are those of the k nearest codes [N, W], and of the ids."""
    from hashattn.ops.hamming.reference import distances as exact

    all_of = exact(query[None, :, None], codes[None, None])[0, :, 0]  # [n, N]
    nearest = all_of.topk(ids.shape[1], largest=False).values.sort(-1).values
    own = all_of.gather(1, ids)
    if not (torch.equal(distances.sort(-1).values, nearest) and torch.equal(own, distances)):
        raise RuntimeError("FAISS finds other keys than the reference")
