"""Buffers that a thread uses again and again: fresh memory often costs more than the work that is done in it."""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.held: dict[str, npt.NDArray[np.uint8]] = {}


_BUFFERS = _Buffers()


def held_bytes() -> int:
    """Bytes that this thread's buffers take."""
    return sum(buffer.nbytes for buffer in _BUFFERS.held.values())


def borrow(what: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised array, good until this thread borrows the same thing again: never hand it out.

    A buffer grows to the largest size that was asked for, and stays.
    """
    kind = np.dtype(dtype)
    size = prod(shape) * kind.itemsize
    held = _BUFFERS.held.get(what)
    if held is None or held.size < size:
        held = _BUFFERS.held[what] = np.empty(size + size // 4, np.uint8)
    return held[:size].view(kind).reshape(shape)
