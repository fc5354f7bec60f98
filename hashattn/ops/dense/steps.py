"""Dense steps by a kernel where one serves them, else in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode.device import has_triton, why_not_nvidia
from hashattn.ops.decode.request import DEVICES, DTYPES, HEAD_DIMS, MOST_TOKENS
from hashattn.ops.dense import reference


def splits(q: Tensor, keys: Tensor) -> bool:
    """Whether a kernel serves queries [B, Hq, T, D] of such keys [B, Hkv, N, D], which are gapless rows."""
    if q.device.type not in DEVICES or q.dtype not in DTYPES or not 1 <= q.shape[2] <= MOST_TOKENS:
        return False
    rows = q.shape[3] in HEAD_DIMS and keys.shape[3] == q.shape[3] and keys.stride()[2:] == (q.shape[3], 1)
    return rows and why_not_nvidia() is None and has_triton()


def append(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    """See :func:`hashattn.ops.dense.reference.append`."""
    if torch.compiler.is_compiling():
        torch.ops.hashattn.dense_append(k, v, keys, values, length)
    elif splits(k, keys):
        from hashattn.ops.dense import triton

        triton.append(k, v, keys, values, length)
    else:
        reference.append(k, v, keys, values, length)


def attend(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, length: Tensor, scale: float) -> Tensor:
    """See :func:`hashattn.ops.dense.reference.attend`."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.hashattn.dense_attend(q, keys, values, starts, length, scale)
        return out
    if splits(q, keys):
        from hashattn.ops.dense import triton

        return triton.attend(q, keys, values, starts, length, scale)
    return reference.attend(q, keys, values, starts, length, scale)


def attend_all(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of queries [B, Hq, 1, D] to all of keys and values [B, Hkv, N, D], which :func:`splits` lets pass."""
    from hashattn.ops.dense import triton

    return triton.attend(q, keys, values, None, None, scale)
