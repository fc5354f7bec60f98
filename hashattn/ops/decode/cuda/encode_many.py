"""Encoding many keys at once in CUDA C++, as after a prefill: one kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hashattn.ops.decode.cuda.decode import WIDEST
from hashattn.ops.decode.cuda.launches import TYPES, Launch
from hashattn.ops.decode.device import check_nvidia, on, stream_of
from hashattn.ops.decode.estimate import NORMS
from hashattn.ops.decode.maps import Map

KEYS = 128  # of a program


class Arguments(ctypes.Structure):
    """What the kernel is given: struct EncodeMany of encode_many.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "centre", "linear", "codes", "norms")),
        *(("stride", ctypes.c_longlong), ("count", ctypes.c_int), ("tiles", ctypes.c_int)),
    )


def encode_many(k: Tensor, centre: Tensor | None, by: Map, norms: bool) -> tuple[Tensor, Tensor | None]:
    """See :func:`hashattn.ops.decode.encode_reference.encode_many`.

    Raises:
        RuntimeError: the kernel does not compile or launch.
    """
    check_nvidia(k.device)
    (batch, heads, count, dim), bits = k.shape, by.linear.shape[1]
    k, words, tiles = in_rows(k), -(-bits // 64), -(-count // KEYS)
    codes = k.new_empty((batch, heads, count, words), dtype=torch.int64)
    lengths = k.new_empty((batch, heads, count, 1), dtype=NORMS) if norms else None
    given = Arguments(keys=k.data_ptr(), linear=by.linear.data_ptr(), codes=codes.data_ptr())
    given.centre = None if centre is None else centre.data_ptr()
    given.norms = None if lengths is None else lengths.data_ptr()
    given.stride, given.count, given.tiles = k.stride(1) // dim, count, tiles
    with on(k.device):
        launch(dim, k.dtype, bits, batch * heads * tiles).bound(given, k.device)(stream_of(k.device))
    return codes, lengths


def in_rows(k: Tensor) -> Tensor:
    """Keys whose heads lie one stride apart and hold their rows in one piece, which may be read in 16 bytes."""
    heads, _, dim = k.shape[1:]
    lies = k.stride(3) == 1 and k.stride(2) == dim and k.stride(1) % dim == 0
    apart = len(k) == 1 or k.stride(0) == heads * k.stride(1)
    return k if lies and apart and k.data_ptr() % WIDEST == 0 else k.clone(memory_format=torch.contiguous_format)


def launch(dim: int, dtype: torch.dtype, bits: int, programs: int) -> Launch:
    """The launch for keys [dim] by so many programs for each word."""
    words = -(-bits // 64)
    defines = {"DIM": dim, "TYPE": TYPES[dtype], "BITS": bits, "WORDS": words}
    return Launch("encode_many", tuple(defines.items()), (programs, words, 1), 128)
