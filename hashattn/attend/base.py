"""What an attend stage is, and the softmax that all of them end with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from hashattn.types import Output, Selection
from hashattn.view import View


class Keys(Protocol):
    """What an attend stage reads of a cache."""

    @property
    def keys(self) -> Tensor: ...  # [B, Hkv, N, D]
    @property
    def values(self) -> Tensor: ...  # [B, Hkv, N, D]
    @property
    def codes(self) -> Tensor: ...  # int64 [B, heads, N, W]
    @property
    def norms(self) -> Tensor: ...  # float16 [B, Hkv, N, 1], |k - centre|
    @property
    def centre(self) -> Tensor: ...  # float32 [B, Hkv, D]
    @property
    def bits(self) -> int: ...  # length of a code
    def gather(self, what: str, ids: Tensor) -> Tensor: ...  # rows of one of the above at [B, H, T, K]
    def seen(self, tokens: int, causal: bool = True) -> Tensor | None: ...  # bool [B, 1, T, N], None for all


class Attend(ABC):
    """Softmax over a selection.

    Attributes:
        needs_selection: whether it reads a selection at all.
        needs_norms: whether the cache has to keep |k - centre| (2 bytes a key).
        code: the kind of code it reads ("binary"), or None if it reads keys and values only.
    """

    needs_selection: bool = True
    needs_norms: bool = False
    code: str | None = None

    @abstractmethod
    def attend(
        self, q: Tensor, cache: Keys, selection: Selection | None, scale: float, *, view: View | None = None,
        need_lse: bool = False, need_weights: bool = False,
    ) -> Output:  # fmt: skip
        """Attend with queries [B, Hq, T, D] to the selected keys of the cache.

        Args:
            view: what the selector saw; for stages that read codes.
            need_lse, need_weights: whether Output carries these.
        """

    def layer(self, i: int) -> Attend:
        """The stage for layer i of a model; stages that serve every layer return themselves."""
        return self


def head_logits(q: Tensor, rows: Tensor) -> Tensor:
    """Products of queries [B, Hq, T, D] with gathered keys [B, H, T, K, D], G = Hq / H: float32 [B, H, T, G, K]."""
    heads = rows.shape[1]
    grouped = q.float().unflatten(1, (heads, -1)).transpose(2, 3)  # [B, H, T, G, D]
    return grouped @ rows.float().transpose(-1, -2)


def softmax_over(
    logits: Tensor, selection: Selection, values: Tensor, dtype: torch.dtype, need_lse: bool, need_weights: bool
) -> Output:
    """Softmax of logits [B, H, T, G, K] over the filled slots, with gathered values [B, H, T, K, D]."""
    if selection.log_weights is not None:
        logits = logits + selection.log_weights.unsqueeze(3)
    logits = logits.masked_fill((selection.ids < 0).unsqueeze(3), -torch.inf)
    peak = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    p = (logits - peak).exp()
    total = p.sum(-1, keepdim=True)
    weights = p / total.clamp(min=torch.finfo(torch.float32).tiny)
    out = (weights.to(values.dtype) @ values).masked_fill(total == 0, 0)  # [B, H, T, G, D]
    return Output(
        out.transpose(2, 3).flatten(1, 2).to(dtype),
        (peak + total.log()).squeeze(-1).transpose(2, 3).flatten(1, 2) if need_lse else None,
        weights.transpose(2, 3).flatten(1, 2) if need_weights else None,
    )
