"""Attention to given columns on a GPU, in one kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from hashattn.ops.attend.constants import ROWS, attend_constants
from hashattn.ops.attend.reference import Parts
from hashattn.ops.attend.triton import attend_ids
from hashattn.ops.decode.device import check_nvidia, on
from hashattn.ops.decode.sizes import grid


def attend(q: Tensor, keys: Tensor, values: Tensor, ids: Tensor, scale: float, need_weights: bool = False) -> Parts:
    """What :func:`reference.logits` and :func:`reference.weigh` give, without gradients.

    Args:
        q: [B, Hq, T, D].
        keys, values: [B, Hkv, room, D], contiguous.
        ids: int32 [B, H, T, K] with H = Hkv or Hq: columns, -1 in empty slots.

    Returns:
        out [B, Hq, T, D], lse float32 [B, Hq, T], and weights float32 [B, Hq, T, K] on request.
    """
    check_nvidia(q.device)
    (batch, q_heads, tokens, dim), (heads, slots) = q.shape, (ids.shape[1], ids.shape[3])
    padded = triton.cdiv(max(1, slots), ROWS) * ROWS
    ids, q = F.pad(ids, (0, padded - slots), value=-1).contiguous(), q.contiguous()
    rows, width = batch * heads * tokens, triton.next_power_of_2(dim)
    parts = q.new_empty((rows, padded // ROWS, q_heads // heads, width), dtype=torch.float32)
    stats, arrived = parts.new_empty((*parts.shape[:3], 2)), torch.zeros(rows, dtype=torch.int32, device=q.device)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    weights = parts.new_empty((*q.shape[:3], padded)) if need_weights else None
    given, room = (q, keys, values, ids, None, None, parts, stats, arrived, out, lse, weights), keys.shape[2]
    constants = attend_constants(q_heads, heads, keys.shape[1], dim, q.device)
    with on(q.device):
        attend_ids[grid(padded // ROWS, rows, batch)](*given, scale, room, room, padded, tokens, **constants)
    return out, lse, None if weights is None else weights[..., :slots]
