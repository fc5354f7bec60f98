"""Attention over selected keys on the CPU: torch's bags of embeddings fetch the rows ahead, far apart as they lie."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hashattn.ops.attend.reference import Parts


def logits(q: Tensor, keys: Tensor, ids: Tensor, scale: float, rows: Tensor | None = None) -> Tensor:
    """The same result as :func:`reference.logits`, for tensors on the CPU; without gradients."""
    batch, q_heads, tokens, dim = q.shape
    heads = ids.shape[1]
    by_token = q if tokens == 1 else q.unflatten(1, (heads, -1)).transpose(2, 3)
    grouped = by_token.reshape(batch * heads * tokens, -1, dim)
    rows = row_numbers(ids, keys.shape[1], keys.shape[2]) if rows is None else rows
    found = bags(keys, rows, 1).view(len(grouped), ids.shape[3], dim)
    return torch.bmm(grouped.float() * scale, found.float().transpose(1, 2)).view(
        batch, heads, tokens, q_heads // heads, -1
    )


def weigh(
    logits: Tensor, values: Tensor, ids: Tensor, dtype: torch.dtype, *, log_weights: Tensor | None = None,
    rows: Tensor | None = None, need_lse: bool = False, need_weights: bool = False,
) -> Parts:  # fmt: skip
    """The same result as :func:`reference.weigh`, for tensors on the CPU; without gradients."""
    group, slots = logits.shape[3:]
    if log_weights is not None:
        logits = logits + log_weights.unsqueeze(3)
    if bool(ids.numpy().min(initial=0) < 0):
        logits = logits.masked_fill((ids < 0).unsqueeze(3), -torch.inf)
    weights, nothing = torch.softmax(logits, -1), None
    if bool(weights[..., :1].isnan().any()):  # as of a query that selected nothing, or of what is not finite
        nothing = (ids < 0).all(-1)[..., None, None].expand(*logits.shape[:4], 1)
        weights = weights.masked_fill(nothing, 0)
    rows = row_numbers(ids, values.shape[1], values.shape[2]) if rows is None else rows
    if group > 1:  # the group's other heads find the rows in the cache
        rows = rows.view(-1, 1, slots).expand(-1, group, -1).reshape(-1)
    out = bags(values, rows, slots, weights.to(values.dtype).view(-1)).to(dtype)
    lse = logits.logsumexp(-1, keepdim=True) if need_lse else None
    if nothing is not None:
        out = out.masked_fill(nothing.reshape(-1, 1), 0)  # values may be of padding
        lse = lse if lse is None else lse.where(nothing | ~weights[..., :1].isnan(), torch.nan)
    return (
        _by_query_head(out, logits.shape),
        _by_query_head(lse, logits.shape).squeeze(-1) if lse is not None else None,
        _by_query_head(weights, logits.shape) if need_weights else None,
    )


def bags(storage: Tensor, rows: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    """Sums of every `size` rows of storage [B, heads, room, X], weighted if asked, in float32 or better: [n, X]."""
    offsets = torch.arange(0, len(rows), size)
    return torch.embedding_bag(storage.view(-1, storage.shape[3]), rows, offsets, False, 0, False, weights)[0]


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


def _by_query_head(x: Tensor, shape: torch.Size) -> Tensor:
    """Rows of [B, H, T, G, ...] as [B, H * G, T, X]."""
    batch, heads, tokens, group = shape[:4]
    if tokens == 1:
        return x.view(batch, heads * group, 1, -1)
    return x.view(batch, heads, tokens, group, -1).transpose(2, 3).flatten(1, 2)
