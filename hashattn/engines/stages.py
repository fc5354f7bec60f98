"""Reference: the stages one after the other, as plain PyTorch has them. Stages: also as FAISS and numpy do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.cache.kv_cache import KVCache
from hashattn.core.attention_sums import Attended
from hashattn.core.types import Output, Selection, Table
from hashattn.engines.base import Answer, Call, Engine, PlanRow, PreparedStep, Request, part_name, selector_name
from hashattn.engines.parts import Parts


class Reference(Engine):
    """Plain PyTorch, on any device: the specification."""

    name = "reference"

    def why_not(self, parts: Parts, request: Request) -> list[str]:
        return []

    def prepare(self, parts: Parts, request: Request) -> PreparedStep:
        return Stages(parts, host=False)

    def rows(self, parts: Parts, request: Request) -> list[PlanRow]:
        binary = parts.index is not None and parts.index.flat_codes
        return stage_rows(parts, "PyTorch, plain operations" if binary else "PyTorch", "PyTorch top-k")


def stage_rows(parts: Parts, scan: str, select: str, remark: str = "") -> list[PlanRow]:
    """The rows of a plan whose stages come one after the other."""
    rows, index, encoder = [], parts.index, part_name(parts.encoder)
    if index is not None and index.remark():
        scan, remark = "its own search", index.remark()
    if parts.ranks:
        rows = [
            PlanRow("encode", f"{encoder}: PyTorch", "one token's query and key; keys late and in bulk"),
            PlanRow("scan", f"{part_name(index)}: {scan}", remark),
        ]
    exact = "exact, ties to the most recent key" if index is None or index.scans else "of what was found"
    rows.append(PlanRow("select", f"{selector_name(parts.selector)}: {select}", exact))
    rows.append(PlanRow("attend", f"{part_name(parts.attend)}: gather and softmax in PyTorch"))
    return rows


@dataclass(frozen=True, eq=False)
class Stages:
    """A step of them: encode, view, select, attend.

    Attributes:
        host: whether FAISS and numpy scan and choose, where they can.
    """

    parts: Parts
    host: bool

    def __call__(self, q: Tensor, cache: KVCache, call: Call) -> Answer:
        """Choose keys for queries [B, Hq, T, D], the last ones of the cache, and attend to them."""
        selector, tokens, spans = self.parts.selector, q.shape[2], cache.spans(q.shape[2], call.causal)
        assert selector is not None
        if not selector.accumulates:
            return self.search(q, cache, call, spans)
        selector.refresh(cache.attention_sums, cache.keys, cache._starts, call.step.layer)
        if not selector.one_by_one:
            return self.search(q, cache, call, spans)
        found = [
            self.search_and_sum(q[:, :, t : t + 1], cache, call, [row[t : t + 1] for row in spans], tokens - t)
            for t in range(tokens)
        ]
        return found[0] if tokens == 1 else joined(found)

    def search(
        self, q: Tensor, cache: KVCache, call: Call, spans: Table, need_weights: bool = False
    ) -> tuple[Output, Selection]:
        """The same for queries that see these columns."""
        encoder, selector, attend = self.parts.encoder, self.parts.selector, self.parts.attend
        assert selector is not None
        with torch.no_grad():  # codes choose: gradients go through what is chosen
            query = encoder.encode_query(q) if encoder is not None else None
        view = cache.view(query, q.shape[1], spans, host=self.host, q=q, scale=call.scale)
        selection = selector.select(view, call.step)
        warmup = self.parts.warmup(cache)
        if min(end - first for row in spans for first, end in row) < warmup:
            selection = keep_short(selection, view.visible, warmup)
        wanted = {"need_lse": call.need_lse, "need_weights": need_weights or call.need_weights}
        return attend.attend(q, cache, selection, call.scale, view=view, **wanted), selection

    def search_and_sum(
        self, q: Tensor, cache: KVCache, call: Call, spans: Table, from_end: int
    ) -> tuple[Output, Selection]:
        """The same for the query [B, Hq, 1, D] so many columns from the end; the selector is shown it, but once."""
        selector, column = self.parts.selector, len(cache) - from_end
        assert selector is not None
        output, selection = self.search(q, cache, call, spans, need_weights=True)
        if column >= cache.attention_sums.queries.end:
            keys = cache.keys[:, :, : column + 1]
            shown = Attended(cache.attention_sums, q.detach(), keys, spans, call.scale, call.step.layer)
            selector.accumulate(shown, selection, output.weights)
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
