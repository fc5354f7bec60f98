"""Call: a search by the reference or the CPU's engine, of several queries at once or of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import Output, Selection, Step
from hashattn.core.votes import Shown
from hashattn.ops.nearest.cpu import Table

if TYPE_CHECKING:
    from hashattn.attention import HashAttention


@dataclass(frozen=True, eq=False)
class Call:
    """What the queries of a call share.

    Attributes:
        engine: "reference" or "cpu", or "triton" for what that leaves to the reference.
        need_lse, need_weights: what the Output carries.
    """

    attn: HashAttention
    cache: KVCache
    scale: float
    engine: str
    step: Step
    need_lse: bool
    need_weights: bool

    def search(self, q: Tensor, spans: Table, need_weights: bool = False) -> tuple[Output, Selection]:
        """Choose keys for queries [B, Hq, T, D] among the columns that they see, and attend to them."""
        attn, cache = self.attn, self.cache
        assert attn.selector is not None
        with torch.no_grad():  # codes choose: gradients go through what is chosen
            query = attn.encoder.encode_query(q) if attn.encoder is not None else None
        view = cache.view(query, q.shape[1], spans, host=self.engine == "cpu", q=q, scale=self.scale)
        selection = attn.selector.select(view, self.step)
        warmup = cache.warmup if attn.encoder is not None else 0  # what ranks nothing needs no centre
        if min(end - first for row in spans for first, end in row) < warmup:
            selection = keep_short(selection, view.visible, warmup)
        need_weights = need_weights or self.need_weights
        output = attn.attend.attend(
            q, cache, selection, self.scale, view=view, need_lse=self.need_lse, need_weights=need_weights
        )
        return output, selection

    def search_and_vote(self, q: Tensor, spans: Table, column: int) -> tuple[Output, Selection]:
        """The same for the query [B, Hq, 1, D] of a column, which the selector is shown unless it has been before."""
        attn, cache = self.attn, self.cache
        assert attn.selector is not None
        output, selection = self.search(q, spans, need_weights=True)
        if column >= cache.votes.queries.end:
            keys = cache.keys[:, :, : column + 1]
            shown = Shown(cache.votes, q.detach(), keys, spans, self.scale, self.step.layer)
            attn.selector.observe(shown, selection, output.weights)
        return output, selection


def joined(parts: Sequence[tuple[Output, Selection]]) -> tuple[Output, Selection]:
    """Calls of one query each as one of them all."""
    outputs, selections = zip(*parts, strict=True)
    slots = max(chosen.ids.shape[-1] for chosen in selections)

    def whole(found: Sequence[Tensor | None], fill: float, pad: bool = True) -> Tensor | None:
        kept = [x for x in found if x is not None]
        if not kept:
            return None
        return torch.cat([F.pad(x, (0, slots - x.shape[-1]), value=fill) if pad else x for x in kept], 2)

    ids = whole([x.ids for x in selections], -1)
    out = whole([x.out for x in outputs], 0, pad=False)
    assert ids is not None and out is not None
    lse, weights = whole([x.lse for x in outputs], 0, pad=False), whole([x.weights for x in outputs], 0)
    tier, log_weights = whole([x.tier for x in selections], 0), whole([x.log_weights for x in selections], 0)
    return Output(out, lse, weights), Selection(ids, tier, log_weights)


def keep_short(selection: Selection, visible: Tensor, warmup: int) -> Selection:
    """Give queries that see fewer than `warmup` keys all of them, exactly: their row has (or had) no centre."""
    first, end = visible[..., :1], visible[..., 1:]  # [B, T, 1]
    slots = torch.arange(max(selection.ids.shape[-1], warmup), device=visible.device)
    everything = torch.where(first + slots < end, first + slots, -1).to(torch.int32)  # [B, T, slots]
    short = (end - first < warmup).unsqueeze(1)  # [B, 1, T, 1]
    extra = len(slots) - selection.ids.shape[-1]

    def widen(x: Tensor | None, fill: int, replacement: Tensor | int) -> Tensor | None:
        if x is None:
            return None
        padded = torch.nn.functional.pad(x, (0, extra), value=fill)
        return torch.where(short, torch.as_tensor(replacement, dtype=x.dtype, device=x.device), padded)

    ids = widen(selection.ids, -1, everything.unsqueeze(1))
    assert ids is not None
    tier, log_weights = widen(selection.tier, 0, 0), widen(selection.log_weights, 0, 0)
    return Selection(ids, tier, log_weights, collisions=selection.collisions)  # any slot may be critical
