"""Packing of sign bits and Hamming distances between packed codes."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.hamming import cpu, reference
from hashattn.ops.hamming.reference import popcount, unpack_bits, words

__all__ = ["differing", "distances", "pack_bits", "popcount", "query_planes", "unpack_bits", "words"]


def distances(query: Tensor, codes: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
    """Distances of every query to every key; see :func:`reference.distances`.

    Args:
        host: compute them by FAISS or numpy, for tensors on the CPU.
    """
    return (cpu if host else reference).distances(query, codes, biased=biased)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack bool [..., L] into int64 [..., ceil(L / 64)]; see :mod:`reference`."""
    return (cpu if bits.device.type == "cpu" else reference).pack_bits(bits)


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Differing bits of int64 codes [..., W], broadcast against each other; see :func:`reference.differing`."""
    return (cpu if a.device.type == "cpu" else reference).differing(a, b)


def query_planes(projection: Tensor, query_bits: int) -> Tensor:
    """Pack projected queries into bit planes; see :func:`reference.query_planes`."""
    plain = projection.device.type != "cpu" or torch.compiler.is_compiling()  # numpy would break a traced graph
    return (reference if plain else cpu).query_planes(projection, query_bits)
