"""Columns: those of a cache's layers, moved within their rows when rows have accepted different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.static_layer import HashedStaticLayer

FIRST, LAST = 16, 128  # columns that stay the first, and the last: sinks, and those that recent tokens are kept for
MOVED = (HashedLayer, HashedStaticLayer, DynamicLayer, StaticLayer)


def why_not_move(layer: Any) -> str | None:
    """Why columns of a layer cannot be moved; None if they can."""
    if type(layer) in (HashedLayer, HashedStaticLayer):
        reason: str | None = layer.kv.why_not_move() if layer.kv is not None else "it holds nothing"
        return reason
    return None if type(layer) in (*MOVED, DynamicSlidingWindowLayer) else f"a {type(layer).__name__} keeps more"


def close_holes(starts: list[int], ends: list[int], holes: list[int]) -> tuple[Tensor, Tensor]:
    """What is moved so that rows end at one column again, each beginning so many columns later.

    The first columns of a row and the last keep their order; what follows the first ones goes before the last ones, as
    full attention asks for no order, its positions being in the keys. Short rows are moved as a whole.

    Args:
        starts, ends: of the rows, columns; holes: columns behind the ends, up to where all rows are to end.

    Returns:
        sources and targets, int64 [B, n]; all is read before anything is written.
    """
    found = []
    for s, e, h in zip(starts, ends, holes, strict=True):
        if not h:
            sources, targets = [e - 1], [e - 1]
        elif e - s <= FIRST + LAST + h:
            sources, targets = [*range(s, e)], [*range(s + h, e + h)]
        else:
            sources = [*range(s, s + FIRST + h), *range(e - LAST, e)]
            targets = [*range(s + h, s + h + FIRST), *range(e - LAST, e + h)]
        found.append((sources, targets))
    most = max(len(sources) for sources, _ in found)
    pairs = [[x + x[-1:] * (most - len(x)) for x in row] for row in found]  # the last one several times
    both = torch.tensor(pairs)
    return both[:, 0], both[:, 1]


def move(layer: Any, sources: Tensor, targets: Tensor, starts: list[int]) -> None:
    """Move columns of a layer that keeps all of them; rows then begin at these starts."""
    if isinstance(layer, HashedLayer):
        layer.move(sources, targets, starts)
        return
    for held in (layer.keys, layer.values):
        at = (
            x.to(held.device)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]) for x in (targets, sources)
        )
        held.scatter_(2, next(at), held.gather(2, next(at)))


def cut_window(layer: Any, dropped: list[int], columns: int, spare: int) -> None:
    """Let go of the last columns of each row of a window's layer, whose rows then end at one column in their order.

    Args:
        dropped: columns of each row; columns: that the cache then has.
        spare: columns that are kept beyond what the window shows, for rows that others may have to wait for.
    """
    held = layer.keys.shape[2]
    width = min(columns, held, layer.sliding_window - 1 + spare)
    first = held - width - torch.tensor(dropped, device=layer.keys.device)
    at = (first[:, None] + torch.arange(width, device=first.device)).clamp(min=0)[:, None, :, None]
    layer.keys = layer.keys.gather(2, at.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
    layer.values = layer.values.gather(2, at.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
    layer.cumulative_length = columns
