"""Specification of attention over selected keys, in plain PyTorch; runs on any device."""

from __future__ import annotations

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor | None, Tensor | None]  # out, lse, weights


def logits(q: Tensor, keys: Tensor, ids: Tensor, scale: float, rows: Tensor | None = None) -> Tensor:
    """Scaled products of queries with their selected keys.

    Args:
        q: [B, Hq, T, D].
        keys: [B, Hkv, room, D], contiguous.
        ids: int32 [B, H, T, K] with H = Hkv or Hq: columns, -1 in empty slots (whose logits mean nothing).
        rows: row_numbers(ids, Hkv, room), if they are known.

    Returns:
        float32 [B, H, T, G, K], G = Hq / H; computed in float32.
    """
    grouped = q.float().unflatten(1, (ids.shape[1], -1)).transpose(2, 3)  # [B, H, T, G, D]
    return grouped @ gather(keys, ids, rows).float().transpose(-1, -2) * scale


def weigh(
    logits: Tensor, values: Tensor, ids: Tensor, dtype: torch.dtype, *, log_weights: Tensor | None = None,
    rows: Tensor | None = None, need_lse: bool = False, need_weights: bool = False,
) -> Parts:  # fmt: skip
    """Softmax of logits [B, H, T, G, K] over the filled slots of ids, and the weighted sum of their values.

    Args:
        values: [B, Hkv, room, D], contiguous.
        ids: int32 [B, H, T, K], -1 in empty slots.
        dtype: of the output.
        log_weights: float32, as ids: added to the logits.
        rows: as in :func:`logits`.

    Returns:
        out [B, Hq, T, D], zero where a query selected nothing, NaN where no softmax is left: logits of NaN or inf, or
        of -inf alone; on request lse float32 [B, Hq, T] and weights float32
        [B, Hq, T, K]. The softmax is float32, weights are rounded to the values' dtype.
    """
    if log_weights is not None:
        logits = logits + log_weights.unsqueeze(3)
    logits = logits.masked_fill((ids < 0).unsqueeze(3), -torch.inf)
    nothing = (ids < 0).all(-1)[..., None, None]  # [B, H, T, 1, 1]
    peak = logits.detach().amax(-1, keepdim=True).masked_fill(nothing, 0)
    p = (logits - peak).exp()
    total = p.sum(-1, keepdim=True)
    weights = p / total.masked_fill(nothing, 1)
    out = (weights.to(values.dtype) @ gather(values, ids, rows)).masked_fill(nothing, 0)  # [B, H, T, G, D]
    return (
        out.transpose(2, 3).flatten(1, 2).to(dtype),
        (peak + total.log()).squeeze(-1).transpose(2, 3).flatten(1, 2) if need_lse else None,
        weights.transpose(2, 3).flatten(1, 2) if need_weights else None,
    )


def gather(storage: Tensor, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    """Rows of storage [B, heads, room, X] at columns ids [B, H, T, K]: [B, H, T, K, X]."""
    if rows is None:
        rows = row_numbers(ids, storage.shape[1], storage.shape[2])
    return storage.view(-1, storage.shape[-1]).index_select(0, rows).view(*ids.shape, -1)


def row_numbers(ids: Tensor, heads: int, room: int) -> Tensor:
    """Where columns ids [B, H, T, K] lie in storage [B, heads, room, X] seen as rows of width X: int64 [B*H*T*K].

    An empty slot (-1) reads a row that is kept anyway, so that no padding is touched while anything is kept.
    """
    batch, own = ids.shape[:2]
    head = torch.arange(own, device=ids.device) * heads // own
    base = (torch.arange(batch, device=ids.device)[:, None] * heads + head) * room  # [B, H]
    columns = torch.where(ids < 0, ids.amax(-1, keepdim=True).clamp(min=0), ids)
    return (columns + base[:, :, None, None]).flatten()
