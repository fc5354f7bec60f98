"""What selectors share that look again at the keys which another one found."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hashattn.core.naming import short
from hashattn.core.types import Selection
from hashattn.index.view import View
from hashattn.selectors.base import Selector


def check_inner(name: str, inner: Selector) -> None:
    """Raise TypeError unless this is a ranked selector without weights whose keys stand for themselves."""
    if not isinstance(inner, Selector) or not inner.ranked or inner.samples:
        raise TypeError(f"inner must be a ranked selector such as TopK that samples nothing, got {short(inner)}")
    if isinstance(inner, nn.Module):
        raise TypeError(f"inner must be a selector without weights; {type(inner).__name__}({name}(...)) would do")


def exact_logits(view: View, ids: Tensor) -> Tensor:
    """float32 [B, H, T, G, K] of the keys at ids [B, H, T, K]."""
    if view.logits is None:
        raise TypeError("this view was made without the queries, so there are no exact logits")
    return view.logits(ids)


def own_distances(view: View, ids: Tensor) -> Tensor:
    """Each query head's own distance to the keys at ids [B, H, T, K]: [B, H, T, G, K]."""
    group = view.q_heads // ids.shape[1]
    columns = ids.clamp(min=0).long().repeat_interleave(group, dim=1)
    return view.raw.gather(-1, columns).unflatten(1, (ids.shape[1], group)).transpose(2, 3)


def only(found: Selection, keep: Tensor) -> Selection:
    """The slots of a selection that keep [B, H, T, K] allows, moved to the front."""
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    if keep.device.type == "cpu":  # asking costs nothing there
        order = order[..., : max(1, int(keep.sum(-1).max()))]

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.gather(-1, order)

    ids = found.ids.masked_fill(~keep, -1).gather(-1, order)
    return replace(found, ids=ids, tier=moved(found.tier), log_weights=moved(found.log_weights), critical_slots=None)
