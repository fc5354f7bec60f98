"""Dense attention of few queries to a long cache: keys are split over a GPU's programs, and read once for a group."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode.device import has_triton, why_not_nvidia
from hashattn.ops.decode.request import DEVICES, DTYPES, HEAD_DIMS, MOST_TOKENS
from hashattn.ops.dense import reference

__all__ = ["append", "attend", "attend_all", "reference", "register", "splits"]


def register() -> None:
    """Let torch.compile know these steps, before one is traced."""
    from hashattn.ops.dense import library as library


def splits(q: Tensor, keys: Tensor) -> bool:
    """Whether a kernel serves queries [B, Hq, T, D] of such keys [B, Hkv, N, D], which are gapless rows."""
    if q.device.type not in DEVICES or q.dtype not in DTYPES or not 1 <= q.shape[2] <= MOST_TOKENS:
        return False
    rows = q.shape[3] in HEAD_DIMS and keys.shape[3] == q.shape[3] and keys.stride()[2:] == (q.shape[3], 1)
    return rows and why_not_nvidia() is None and has_triton()


def append(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    """See :func:`hashattn.ops.dense.reference.append`."""
    if not splits(k, keys):
        reference.append(k, v, keys, values, length)
    elif torch.compiler.is_compiling():
        torch.ops.hashattn.dense_append(k, v, keys, values, length)
    else:
        from hashattn.ops.dense import triton

        triton.append(k, v, keys, values, length)


def attend(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, length: Tensor, scale: float) -> Tensor:
    """See :func:`hashattn.ops.dense.reference.attend`."""
    if not splits(q, keys):
        return reference.attend(q, keys, values, starts, length, scale)
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.hashattn.dense_attend(q, keys, values, starts, length, scale)
        return out
    from hashattn.ops.dense import triton

    return triton.attend(q, keys, values, starts, length, scale)


def attend_all(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of queries [B, Hq, 1, D] to all of keys and values [B, Hkv, N, D], which :func:`splits` lets pass."""
    from hashattn.ops.dense import triton

    return triton.attend(q, keys, values, None, None, scale)
