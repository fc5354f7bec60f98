"""Votes: how much attention past queries paid to each key."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.buffer import TokenBuffer

DROPPED = float("-inf")
_ENTRIES = 1 << 22  # of a matrix of attention weights at a time


class Votes:
    """One number a key and KV head, for selectors that look back; a KVCache owns it, and crops and reorders it.

    Attributes:
        most: at most this many of a head's keys are not dropped; None if nobody counted.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._votes = TokenBuffer(capacity)
        self.most: int | None = None

    def __len__(self) -> int:
        """Keys that have been voted on: later ones are new."""
        return self._votes.length

    @property
    def nbytes(self) -> int:
        return self._votes.nbytes

    def of(self, keys: int, like: Tensor) -> Tensor:
        """float32 [B, Hkv, keys] on the device of `like` [B, Hkv, ...]: zero for new keys, DROPPED for dropped ones."""
        votes = torch.zeros(*like.shape[:2], keys, device=like.device)
        held = min(keys, len(self))
        if held:
            votes[..., :held] = self._votes.view[:, :, :held, 0]
        return votes

    def set(self, votes: Tensor, most: int | None = None) -> None:
        """Replace them all by [B, Hkv, N]."""
        self._votes.truncate(0)
        self._votes.append(votes.float().unsqueeze(-1))
        self.most = most

    def truncate(self, length: int) -> None:
        """Keep those of the first `length` keys."""
        self._votes.truncate(length)

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        self._votes.select(rows)


@torch.no_grad()
def dense_votes(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Full attention's weights, summed over queries and the heads of a group: float32 [B, Hkv, N].

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, N, D].
        seen: bool [B, 1, T, N], which keys each query sees; None for all.
    """
    votes = torch.zeros(*k.shape[:3], device=k.device)
    block = max(1, _ENTRIES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], block):
        part = q[:, :, first : first + block].float()
        logits = (part.unflatten(1, (k.shape[1], -1)) @ k.float().unsqueeze(2).transpose(-1, -2)) * scale
        if seen is not None:
            logits = logits.masked_fill(~seen[:, :, first : first + block].unsqueeze(1), -torch.inf)
        votes += torch.softmax(logits, -1).nan_to_num(0.0).sum((2, 3))
    return votes


@torch.no_grad()
def selected_votes(ids: Tensor, weights: Tensor, keys: int) -> Tensor:
    """Weights [B, Hq, T, K] over the slots of ids [B, Hkv, T, K], summed likewise: float32 [B, Hkv, N]."""
    grouped = weights.unflatten(1, (ids.shape[1], -1)).sum(2).flatten(2)  # [B, Hkv, T*K]
    columns = torch.where(ids < 0, keys, ids).long().flatten(2)
    votes = torch.zeros(*ids.shape[:2], keys + 1, device=ids.device)
    return votes.scatter_add_(-1, columns, grouped.float().nan_to_num(0.0))[..., :keys]  # a broken query has no vote
