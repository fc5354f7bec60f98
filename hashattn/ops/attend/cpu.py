"""Attention over selected keys on the CPU: rows are gathered into buffers that stay, whole batches are multiplied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hashattn.ops.attend.reference import Parts
from hashattn.ops.scratch import borrow


def attend(
    q: Tensor, keys: Tensor, values: Tensor, ids: Tensor, scale: float, *, log_weights: Tensor | None = None,
    need_lse: bool = False, need_weights: bool = False,
) -> Parts:  # fmt: skip
    """The same result as :func:`reference.attend`, for tensors on the CPU; without gradients."""
    batch, q_heads, tokens, dim = q.shape
    heads, slots = ids.shape[1], ids.shape[3]
    rows, empty = row_numbers(ids, keys.shape[1], keys.shape[2])
    shape = (batch * heads * tokens, slots, dim)
    grouped = q.reshape(shape[0], -1, dim) if tokens == 1 else _group(q, heads)
    held = gather("keys", keys, rows, shape)
    logits = torch.bmm(grouped.float(), held.float().transpose(1, 2)).mul_(scale)  # [B*H*T, G, K]
    if log_weights is not None:
        logits += log_weights.view(shape[0], 1, slots)
    if empty:
        logits.masked_fill_(ids.view(shape[0], 1, slots) < 0, -torch.inf)
    weights = torch.softmax(logits, -1)
    if empty:
        weights.nan_to_num_(0.0)  # a query that selected nothing
    found = gather("values", values, rows, shape)
    out = torch.bmm(weights.to(values.dtype), found).to(q.dtype)
    group = q_heads // heads
    return (
        _ungroup(out, batch, heads, tokens, group),
        _ungroup(logits.logsumexp(-1, keepdim=True), batch, heads, tokens, group).squeeze(-1) if need_lse else None,
        _ungroup(weights, batch, heads, tokens, group) if need_weights else None,
    )


def row_numbers(ids: Tensor, heads: int, room: int) -> tuple[Tensor, bool]:
    """What :func:`reference.row_numbers` returns, and whether any slot is empty."""
    columns = ids.numpy()
    batch, own = columns.shape[:2]
    empty = bool(columns.min(initial=0) < 0)
    if empty:
        columns = np.where(columns < 0, np.maximum(columns.max(-1, keepdims=True), 0), columns)
    base = np.repeat(np.arange(batch * heads) * room, own // heads)
    return torch.from_numpy((columns.reshape(batch * own, -1) + base[:, None]).ravel()), empty


def gather(what: str, storage: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of storage [..., X] seen as rows of width X, in a borrowed buffer of this shape."""
    kind = np.dtype(f"u{storage.element_size()}")
    out = torch.from_numpy(borrow(what, (len(rows), storage.shape[-1]), kind)).view(storage.dtype)
    torch.index_select(storage.view(-1, storage.shape[-1]), 0, rows, out=out)
    return out.view(shape)


def _group(q: Tensor, heads: int) -> Tensor:
    """[B, Hq, T, D] -> [B * H * T, G, D]."""
    return q.unflatten(1, (heads, -1)).transpose(2, 3).flatten(0, 2)


def _ungroup(x: Tensor, batch: int, heads: int, tokens: int, group: int) -> Tensor:
    """[B * H * T, G, X] -> [B, Hq, T, X]."""
    if tokens == 1:
        return x.view(batch, heads * group, 1, x.shape[-1])
    return x.view(batch, heads, tokens, group, -1).transpose(2, 3).flatten(1, 2)
