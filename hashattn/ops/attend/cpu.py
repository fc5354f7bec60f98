"""Attention over selected keys on the CPU: rows are gathered into one buffer that stays, all heads are multiplied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hashattn.ops.attend.reference import Parts
from hashattn.ops.scratch import borrow


def logits(q: Tensor, keys: Tensor, ids: Tensor, scale: float, rows: Tensor | None = None) -> Tensor:
    """The same result as :func:`reference.logits`, for tensors on the CPU; without gradients."""
    batch, q_heads, tokens, dim = q.shape
    heads = ids.shape[1]
    grouped = q.unflatten(1, (heads, -1)).transpose(2, 3).reshape(batch * heads * tokens, -1, dim)
    found = gather(keys, ids, rows)
    return torch.bmm(grouped.float() * scale, found.float().transpose(1, 2)).view(
        batch, heads, tokens, q_heads // heads, -1
    )


def weigh(
    logits: Tensor, values: Tensor, ids: Tensor, dtype: torch.dtype, *, log_weights: Tensor | None = None,
    rows: Tensor | None = None, need_lse: bool = False, need_weights: bool = False,
) -> Parts:  # fmt: skip
    """The same result as :func:`reference.weigh`, for tensors on the CPU; without gradients."""
    batch, heads, tokens, group, slots = logits.shape
    if log_weights is not None:
        logits = logits + log_weights.unsqueeze(3)
    empty = bool(ids.numpy().min(initial=0) < 0)
    if empty:
        logits = logits.masked_fill((ids < 0).unsqueeze(3), -torch.inf)
    weights = torch.softmax(logits, -1)
    if empty:
        weights.nan_to_num_(0.0)  # a query that selected nothing
    out = torch.bmm(weights.view(-1, group, slots).to(values.dtype), gather(values, ids, rows)).to(dtype)
    return (
        _by_query_head(out.view(batch, heads, tokens, group, -1)),
        _by_query_head(logits.logsumexp(-1, keepdim=True)).squeeze(-1) if need_lse else None,
        _by_query_head(weights) if need_weights else None,
    )


def gather(storage: Tensor, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    """Rows of storage [B, heads, room, X] at columns ids [B, H, T, K]: [B*H*T, K, X], in a buffer that is reused."""
    width = storage.shape[3]
    if rows is None:
        rows = row_numbers(ids, storage.shape[1], storage.shape[2])
    kind = np.dtype(f"u{storage.element_size()}")
    out = torch.from_numpy(borrow("rows", (len(rows), width), kind)).view(storage.dtype)
    torch.index_select(storage.view(-1, width), 0, rows, out=out)
    return out.view(-1, ids.shape[3], width)


def row_numbers(ids: Tensor, heads: int, room: int) -> Tensor:
    """The same result as :func:`reference.row_numbers`, for tensors on the CPU."""
    columns = ids.numpy()
    batch, own = columns.shape[:2]
    if columns.min(initial=0) < 0:
        columns = np.where(columns < 0, np.maximum(columns.max(-1, keepdims=True), 0), columns)
    base = np.arange(0, batch * heads * room, room)
    if own > heads:
        base = np.repeat(base, own // heads)
    return torch.from_numpy((columns.reshape(batch * own, -1) + base[:, None]).ravel())


def _by_query_head(x: Tensor) -> Tensor:
    """[B, H, T, G, X] -> [B, H * G, T, X]."""
    return x.transpose(2, 3).flatten(1, 2)
