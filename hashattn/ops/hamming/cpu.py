"""Hamming distances on the CPU: FAISS's scan if it is installed, numpy's popcount otherwise."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hashattn.ops.scratch import borrow

IntArray = npt.NDArray[Any]

BLOCK = 1 << 18  # distances of planes scanned at a time, which bounds the scratch
_TINY = np.finfo(np.float32).tiny
_PLANES = np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint8)[:, None]
_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cuvs")


@cache
def faiss() -> ModuleType | None:
    """FAISS, or None where it is not installed.

    Raises:
        ImportError: two distributions of it at once, a broken one, or one too old to scan.
    """
    found = [f"{name} {number}" for name in _DISTRIBUTIONS if (number := _version(name)) is not None]
    if len(found) > 1:
        raise ImportError(
            f"{' and '.join(found)} are both installed and overwrite each other's module faiss: pip uninstall -y "
            f'{" ".join(f.split()[0] for f in found)}, then pip install "hashattn[cpu]" or "hashattn[gpu]"'
        )
    try:
        library = importlib.import_module("faiss")
    except ImportError as error:
        if not found:
            return None
        raise ImportError(f"{found[0]} is installed but cannot be imported ({error}): reinstall it") from error
    if not hasattr(library, "hammings"):
        raise ImportError(
            f"faiss {getattr(library, '__version__', 'of unknown version')} has no hammings, which the scan needs: "
            'pip install -U "faiss-cpu>=1.15.1"'
        )
    return library


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pack_bits(bits: Tensor) -> Tensor:
    """The same result as :func:`reference.pack_bits`, for tensors on the CPU."""
    return _words(bits.numpy())


def _words(bits: IntArray) -> Tensor:
    octets = np.packbits(bits, axis=-1, bitorder="little")
    if octets.shape[-1] % 8:
        whole = np.zeros((*octets.shape[:-1], -(-octets.shape[-1] // 8) * 8), np.uint8)  # np.pad takes far longer
        whole[..., : octets.shape[-1]] = octets
        octets = whole
    return torch.from_numpy(octets.view(np.int64))


def query_planes(projection: Tensor, query_bits: int) -> Tensor:
    """The same result as :func:`reference.query_planes`, for tensors on the CPU."""
    values = projection.detach().float().numpy()
    if query_bits == 1:
        return _words(values >= 0)
    half = 1 << (query_bits - 1)
    size = np.abs(values)
    scale = np.maximum(size.max(-1, keepdims=True), _TINY)
    with np.errstate(invalid="ignore"):  # what is not finite has no steps
        steps = np.minimum(np.nan_to_num(size / scale * half, nan=0.0).astype(np.uint8), half - 1)
    levels = np.where(values >= 0, half + steps, half - 1 - steps)
    return _words(levels[..., None, :] & _PLANES[:query_bits])


def differing(a: Tensor, b: Tensor) -> Tensor:
    """The same result as :func:`reference.differing`, for tensors on the CPU."""
    words = np.bitwise_xor(a.numpy(), b.numpy()).view(np.uint64)  # of signed integers numpy counts the magnitude's bits
    return torch.from_numpy(np.asarray(np.bitwise_count(words).sum(-1, dtype=np.int64)))


def as_bytes(codes: Tensor) -> IntArray:
    """int64 codes [..., W] as uint8 [..., 8 * W]; copied if their words are not next to each other."""
    words = codes.numpy()
    return (words if words.strides[-1] == 8 else np.ascontiguousarray(words)).view(np.uint8)


def hammings(query: IntArray, codes: IntArray, out: IntArray) -> None:
    """Hamming distances of uint8 codes [H, Q, bytes] to [H, N, bytes], written to int32 [H, Q, N].

    bytes is a multiple of 8. FAISS takes raw pointers and asks nothing, so that everything is checked here.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that disagree, or heads that are not contiguous.
    """
    if not (query.dtype == codes.dtype == np.uint8 and out.dtype == np.int32):
        raise TypeError(
            f"query, codes and out must be uint8, uint8 and int32, got {query.dtype}, {codes.dtype} and {out.dtype}"
        )
    heads, queries, size = query.shape if query.ndim == 3 else (0, 0, 1)
    keys = codes.shape[1] if codes.ndim == 3 else 0
    if size % 8 or codes.shape != (heads, keys, size) or out.shape != (heads, queries, keys):
        raise ValueError(
            f"query [H, Q, bytes], codes [H, N, bytes] and out [H, Q, N] with whole words of 8 bytes were expected, "
            f"got {query.shape}, {codes.shape} and {out.shape}"
        )
    if heads and not (query[0].flags.c_contiguous and codes[0].flags.c_contiguous and out[0].flags.c_contiguous):
        raise ValueError(
            f"each head of query, codes and out must be C-contiguous, got strides {query.strides}, {codes.strides} and "
            f"{out.strides}; np.ascontiguousarray(...) makes it so"
        )
    library = faiss()
    if library is None:
        for h in range(heads):
            _hammings_numpy(query[h], codes[h], out[h])
    elif keys and queries:
        pointer, scan = library.swig_ptr, library.hammings
        for planes, held, found in zip(query, codes, out, strict=True):
            scan(pointer(planes), pointer(held), queries, keys, size, pointer(found))


def _hammings_numpy(query: IntArray, codes: IntArray, out: IntArray) -> None:
    words, keys = query.view(np.uint64), codes.view(np.uint64)  # of signed integers numpy counts the magnitude's bits
    for row, word in zip(out, words, strict=True):
        np.bitwise_count(keys ^ word).sum(-1, dtype=np.int32, out=row)


def weighted_distances(query: IntArray, weights: list[int], codes: IntArray, out: IntArray) -> None:
    """Weighted sums of the Hamming distances of queries' planes to the keys of their heads.

    Args:
        query: uint8 [H, R * P, bytes], contiguous; P planes for each query.
        weights: of the planes: powers of two, falling to 1.
        codes: uint8 [H, N, bytes]; copied if the rows of a head are not contiguous.
        out: int32 [H, R, N], contiguous; written.
    """
    heads, keys, _ = codes.shape
    if not codes[0].flags.c_contiguous:
        codes = np.ascontiguousarray(codes)
    rows, planes = query.shape[1], len(weights)
    block = min(keys, max(1024, BLOCK // (heads * rows)))
    for first in range(0, keys, block):
        part, target = codes[:, first : first + block], out[:, :, first : first + block]
        direct = planes == 1 and block == keys
        found = out if direct else borrow("planes", (heads, rows, part.shape[1]), np.int32)
        hammings(query, part, found)
        if not direct:
            sum_planes(found.reshape(heads, -1, planes, part.shape[1]), weights, target)


def sum_planes(found: IntArray, weights: list[int], out: IntArray) -> None:
    """Sum int32 [H, R, P, n] over the planes with their weights into [H, R, n]; the first plane is overwritten."""
    if len(weights) == 1:
        out[:] = found[:, :, 0]
    total, weight = found[:, :, 0], weights[0]
    for j in range(1, len(weights)):
        while weight > weights[j]:
            total, weight = np.add(total, total, out=total), weight // 2
        total = np.add(total, found[:, :, j], out=total if j < len(weights) - 1 else out)


def merge_planes(planes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer planes with the same weighted sum of Hamming distances to any key.

    |a - k| is linear in the bit a for either k, so that a full adder (a + b + c = sum + 2 carry, bit by bit) keeps
    the weighted sum: three planes of weight w become one of w and one of 2 w. A group of 4 heads takes 3 planes, of
    16 heads 5.

    Args:
        planes: (weight, bits), weights powers of two, the bits of all codes as one integer.

    Returns:
        The same, the heaviest first; at most two planes of a weight.
    """
    waiting: dict[int, list[int]] = {}
    for weight, plane in planes:
        waiting.setdefault(weight, []).append(plane)
    merged: list[tuple[int, int]] = []
    while waiting:
        weight = min(waiting)
        same = waiting.pop(weight)
        while len(same) > 2:
            a, b, c = same.pop(), same.pop(), same.pop()
            either = a ^ b
            same.append(either ^ c)
            waiting.setdefault(2 * weight, []).append((a & b) | (either & c))
        merged += [(weight, plane) for plane in same]
    return merged[::-1]


def add_bias(codes: IntArray, out: IntArray, times: int) -> None:
    """Make of Hamming distances int32 [H, R, N] to codes uint8 [H, N, bytes] those to codes with a bias, `times` over.

    The scan counted the bits that are set in the last byte, since queries have none there.
    """
    last = np.ascontiguousarray(codes[..., -1])
    extra = np.subtract(last, np.bitwise_count(last), dtype=np.int32)
    if times > 1:
        extra *= times
    out += extra[:, None]


def distances(query: Tensor, codes: Tensor, *, biased: bool = False) -> Tensor:
    """The same result as :func:`reference.distances`, for tensors on the CPU."""
    batch, q_heads, tokens = query.shape[:3]
    heads = codes.shape[1]
    planes = query.unsqueeze(3) if query.ndim == 4 else query.flip(3)  # the heaviest first
    rows, held = as_bytes(planes.reshape(batch, heads, -1, query.shape[-1])), as_bytes(codes)
    weights = [1 << j for j in reversed(range(planes.shape[3]))]
    out = torch.empty(batch, q_heads, tokens, codes.shape[2], dtype=torch.int32)
    for b, found in enumerate(out.view(batch, heads, -1, codes.shape[2]).numpy()):
        weighted_distances(rows[b], weights, held[b], found)
        if biased:
            add_bias(held[b], found, 1)
    return out
