"""Hamming distances on the CPU: FAISS's scan if it is installed, numpy's popcount otherwise."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[Any]

_BLOCK = 1 << 18  # words of scratch at a time: stays in the second-level cache


@cache
def faiss() -> ModuleType | None:
    """FAISS, or None where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        return None


def distances(query: Tensor, codes: Tensor) -> Tensor:
    """The same result as :func:`reference.distances`, for tensors on the CPU."""
    planes = query.unsqueeze(-2) if query.ndim == 4 else query
    batch, q_heads, tokens, n_planes, n_words = planes.shape
    heads, keys = codes.shape[1:3]
    grouped = planes.reshape(batch, heads, -1, n_planes, n_words).permute(3, 0, 1, 2, 4).contiguous()
    out = torch.empty(batch, heads, grouped.shape[3], keys, dtype=torch.int32)
    scan = _scan_numpy if faiss() is None else _scan_faiss
    plane = out if n_planes == 1 else torch.empty_like(out)
    for j in range(n_planes):
        for b in range(batch):
            for h in range(heads):
                scan(grouped[j, b, h].numpy(), codes[b, h].contiguous().numpy(), plane[b, h].numpy())
        if n_planes > 1:
            out = plane.clone() if j == 0 else out.add_(plane, alpha=1 << j)
    return out.view(batch, q_heads, tokens, keys)


def _scan_faiss(query: IntArray, codes: IntArray, out: IntArray) -> None:
    """Distances of int64 [Q, W] to [N, W] into int32 [Q, N]. FAISS takes raw pointers: all three are contiguous."""
    library = faiss()
    assert library is not None
    pointer = library.swig_ptr
    library.hammings(
        pointer(query.view(np.uint8)), pointer(codes.view(np.uint8)), len(query), len(codes), 8 * query.shape[1],
        pointer(out),
    )  # fmt: skip


def _scan_numpy(query: IntArray, codes: IntArray, out: IntArray) -> None:
    """The same with numpy."""
    query, codes = query.view(np.uint64), codes.view(np.uint64)  # of signed integers numpy counts the magnitude's bits
    block = max(1, _BLOCK // max(1, query.size))
    for first in range(0, len(codes), block):
        different = np.bitwise_count(query[:, None] ^ codes[first : first + block])  # uint8 [Q, n, W]
        different.sum(-1, dtype=np.int32, out=out[:, first : first + block])
