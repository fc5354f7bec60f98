"""What a decode step on a GPU is compared with: dense attention, and other ways to select keys."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hashattn.bench.cuda_inputs import Layer
from hashattn.extras import require
from hashattn.ops.decode import Scratch
from hashattn.ops.hamming.reference import distances

BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
PROGRAMS = (128, 256)

Call = Callable[[Layer, int], Tensor]  # of a layer and the number of its query


def dense(scratch: Scratch) -> dict[str, Call]:
    """The dense contenders by name. Each may raise where it does not serve a shape."""
    from hashattn.bench.dense_triton import attend

    calls: dict[str, Call] = {name: _sdpa(backend) for name, backend in BACKENDS.items()}
    for n in PROGRAMS:
        calls[f"Triton {n}"] = lambda layer, i, n=n: attend(  # type: ignore[misc]
            layer.q[i], layer.keys, layer.values, scratch, n
        )
    return calls


def _sdpa(backend: SDPBackend) -> Call:
    def call(layer: Layer, i: int) -> Tensor:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend does not serve: it also raises
            return F.scaled_dot_product_attention(layer.q[i], layer.keys, layer.values, enable_gqa=True)

    return call


def row_distances(layer: Layer, shared: bool) -> Tensor:
    """int32 [rows, keys]: what a step with the layer's first query selects by, for torch.topk."""
    rows = []
    for b in range(len(layer.codes)):
        found = distances(layer.query[0][b : b + 1, :, :, 0], layer.codes[b : b + 1])
        if shared:
            found = found.unflatten(1, (layer.codes.shape[1], -1)).sum(2, dtype=torch.int32)
        rows.append(found.flatten(0, 2))
    return torch.cat(rows)


def faiss_us(layer: Layer, k: int, rounds: int) -> float:
    """Median microseconds of FAISS's exact binary search of one layer, its host's part included.

    Raises:
        ImportError: FAISS is missing, or knows no GPU.
        RuntimeError: FAISS refuses the search.
    """
    faiss = require("faiss", "gpu", "the comparison with FAISS")
    if not hasattr(faiss, "GpuIndexBinaryFlat"):
        raise ImportError("this FAISS has no GPU indexes")
    resources, bits = faiss.StandardGpuResources(), 64 * layer.codes.shape[-1]
    group = layer.query[0].shape[1] // layer.codes.shape[1]
    queries = layer.query[0].flatten(0, 3).cpu().view(torch.uint8).unflatten(0, (-1, group)).numpy()
    indexes = []
    for codes in layer.codes.flatten(0, 1).cpu().view(torch.uint8).numpy():
        index = faiss.GpuIndexBinaryFlat(resources, bits)
        index.add(codes)
        indexes.append(index)
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for index, query in zip(indexes, queries, strict=True):
            index.search(query, k)
        times.append((time.perf_counter() - began) * 1e6)
    return median(times[1:])  # the first allocates
