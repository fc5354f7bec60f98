"""Host: binary codes on a CPU, in compiled loops where these serve, with FAISS's scan and numpy where they do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hashattn.cache.kv_cache import KVCache
from hashattn.core.lasting import lasting
from hashattn.core.naming import short
from hashattn.core.types import Output, Selection
from hashattn.engines import cost
from hashattn.engines.base import Answer, Call, Engine, PlanRow, PreparedStep, Request, part_name, selector_name
from hashattn.engines.fused import asked_of, packed, wants_gradients
from hashattn.engines.parts import Parts
from hashattn.engines.stages import Reference, Stages, stage_rows
from hashattn.ops import compiled, decode

if TYPE_CHECKING:
    from hashattn.ops.compiled.step import Step

_AT_ONCE = 16  # keys that a step encodes itself; more are a product of matrices


class Host(Engine):
    """A compiled step on a CPU, for binary codes and rules; FAISS's scan and numpy for other choices among such codes;
    everything else as the reference has it."""

    name = device = "cpu"

    def why_not(self, parts: Parts, request: Request) -> list[str]:
        kind = request.device.type
        return [] if kind == "cpu" else [f"it needs tensors on the CPU, got {kind}"]

    def prepare(self, parts: Parts, request: Request) -> PreparedStep:
        return Stages(parts, host=True) if why_not_compiled(parts, request) else CompiledStep(parts, request)

    def crossover(self, parts: Parts, request: Request) -> int | None:
        if parts.encoder is not None and not (parts.index is not None and parts.index.flat_codes):
            return None  # of the others no cost is known; scores of floats read as much as dense attention does
        return cost.crossover(parts, request, compiled=not why_not_compiled(parts, request))

    def measured(self, parts: Parts, request: Request) -> str:
        return cost.source(compiled=not why_not_compiled(parts, request))

    def runs_as(self, parts: Parts) -> tuple[str, str]:
        if parts.encoder is not None and parts.encoder.code != "binary":
            return Reference.name, f'"{self.name}" scans binary codes only'
        return self.name, ""

    def rows(self, parts: Parts, request: Request) -> list[PlanRow]:
        if parts.index is None or not parts.index.flat_codes:
            return stage_rows(parts, "PyTorch", "PyTorch top-k", "the reference serves it" if parts.encoder else "")
        reasons = why_not_compiled(parts, request)
        if reasons:
            matrix = parts.selector is not None and parts.selector.matrices
            remark = "; ".join([*(["a matrix of all distances is made"] if matrix else []), *reasons])
            return stage_rows(parts, "FAISS's scan (numpy without FAISS)", "numpy or PyTorch", remark)
        inside = maps_inside(parts)
        both = "queries and the newest keys" if all(inside) else "the newest keys" if inside[1] else "queries"
        encode = f"{both} in the step" if any(inside) else "one token's query and key; keys late and in bulk"
        asked, exact = asked_of(parts, request), "exact, ties to the most recent key"
        if asked is not None and asked.rule.calibrated:
            exact = f"two passes, of raw and of calibrated distances; {exact}"
        return [
            PlanRow("encode", f"{part_name(parts.encoder)}: {'compiled' if any(inside) else 'PyTorch'}", encode),
            PlanRow("scan", f"{part_name(parts.index)}: compiled loops", "distances in bytes"),
            PlanRow("select", f"{selector_name(parts.selector)}: compiled", exact),
            PlanRow("attend", f"{part_name(parts.attend)}: compiled", "rows fetched ahead"),
        ]


def why_not_compiled(parts: Parts, request: Request) -> list[str]:
    """Why the compiled loops do not serve such a step: every reason."""
    if parts.encoder is None or parts.index is None or parts.selector is None:
        return ["compiled loops serve binary codes in a FlatHamming index"]
    asked, reasons = asked_of(parts, request), []
    if parts.encoder.code_heads(request.kv_heads) != request.kv_heads:
        reasons.append("compiled loops serve one code a key, not one for each query head")
    if not parts.attend.compiled:
        reasons.append(f"compiled loops attend exactly, or by tiers, not as {short(parts.attend)}")
    if asked is None:
        return [
            *reasons,
            f"compiled loops serve TopK, Threshold and Tiers, raw or calibrated, not {short(parts.selector)}",
        ]
    return [*reasons, *compiled.why_not(asked)]


def maps_inside(parts: Parts) -> tuple[bool, bool]:
    """Whether the step itself encodes queries, and keys: by maps that all heads share, of keys by linear ones."""
    encoder = parts.encoder
    widths = encoder.widths() if encoder is not None else None
    if encoder is None or widths is None or encoder.biased:
        return False, False
    return len(widths[0]) < compiled.MOST_LAYERS, widths[1] == ()


class Kept(NamedTuple):
    """A step that was made ready, and what for."""

    parts: Parts
    learned: tuple[object, ...]  # of its selector and its attend stage
    step: Step


@dataclass(frozen=True, eq=False)
class CompiledStep:
    """Steps of parts that are served; calls that ask for more go through the stages."""

    parts: Parts
    request: Request

    @cached_property
    def stages(self) -> Stages:
        return Stages(self.parts, host=True)

    @cached_property
    def inside(self) -> tuple[bool, bool]:
        return maps_inside(self.parts)

    def __call__(self, q: Tensor, cache: KVCache, call: Call) -> Answer:
        parts, fewest = self.parts, cache.shortest - (q.shape[2] - 1 if call.causal else 0)
        assert parts.encoder is not None
        plain = cache.kv.in_one_piece and parts.attend.compiled
        if fewest < parts.warmup(cache) or not plain or wants_gradients(parts, q, cache):
            return self.stages(q, cache, call)
        few = q.shape[2] == 1 and 0 < cache.encoded >= len(cache) - _AT_ONCE  # more queries might come before the codes
        encodes = few and self.inside[1] and cache.indexed.settled
        if encodes:
            cache.indexed.reserve(len(cache))
        else:
            cache.encode()
        step, before = self.prepared(q, cache, call.causal), call.step.previous
        query = None if self.inside[0] else packed(parts, q.detach(), cache.kv_heads)
        columns, wanted = (cache.longest, len(cache), cache.encoded), (call.need_lse, call.need_weights)
        followed = None if before is None else (before.ids, call.step.previous_weights)
        found = step(q.contiguous(), query, columns, call.scale, *wanted, followed)
        if encodes:
            cache.indexed.adopt(len(cache))
        alike = q.shape[2] == 1 and cache.shortest == cache.longest and step.like.rule.radius is None
        selection = Selection(found.ids, found.tier, filled=found.ids.numel() if alike else None)
        return Output(found.out, found.lse if call.need_lse else None, found.weights), selection

    def prepared(self, q: Tensor, cache: KVCache, causal: bool) -> Step:
        """Kept with the cache, and made anew where its memory has moved or the encoder was fitted."""
        parts, state, centre = self.parts, cache.on_device, cache.indexed.centres.subtracted
        starts = state.starts(cache._starts, q.device)
        held = [cache.storage(what) for what in ("keys", "values", "codes")]
        assert parts.encoder is not None and parts.selector is not None
        memory = *(x.data_ptr() for x in held), 0 if centre is None else centre.data_ptr(), parts.encoder.fits
        if state.memory != memory:  # steps that were made ready before keep what it was alive
            state.memory, state.prepared = memory, {}
        kept = state.prepared.get((q.shape[1], q.shape[2], causal))
        learned = *parts.selector.learned(), *parts.attend.learned()
        if isinstance(kept, Kept) and kept.parts is parts and kept.learned == learned:
            return kept.step
        step = self._made(q, cache, starts, centre, causal)
        state.prepared[q.shape[1], q.shape[2], causal] = Kept(parts, learned, step)
        return step

    def _rule(self, group: int) -> decode.Rule:
        assert self.parts.selector is not None and self.parts.encoder is not None
        rule = self.parts.selector.rule(group)
        assert rule is not None
        return replace(rule, biased=self.parts.encoder.biased)

    @lasting
    def _made(self, q: Tensor, cache: KVCache, starts: Tensor, centre: Tensor | None, causal: bool) -> Step:
        from hashattn.ops.compiled.step import Step  # imports Numba

        parts, encoder = self.parts, self.parts.encoder
        assert parts.selector is not None and encoder is not None
        rule = self._rule(q.shape[1] // cache.kv_heads)
        if centre is None:
            centre = torch.zeros(cache.batch, cache.kv_heads, cache.head_dim)
        estimate = (
            parts.attend.fused_estimate(cache) if parts.attend.needs_norms and rule.critical is not None else None
        )
        keys, values, codes = (cache.storage(what).detach() for what in ("keys", "values", "codes"))
        norms = cache.storage("norms") if cache.with_norms else None
        stored = decode.Stored(keys, values, codes, torch.empty(0), norms)
        query = torch.empty((*q.shape[:3], encoder.query_bits, codes.shape[3]), dtype=torch.int64, device="meta")
        like = decode.Inputs(q.detach(), query, stored, starts, rule, 1.0, causal, estimate)
        maps = encoder.maps(cache.head_dim, q.device) if any(self.inside) else (None, None)
        own = [one if inside else None for one, inside in zip(maps, self.inside, strict=True)]
        return Step(like, encoder.bits, (own[0], own[1]), centre.float().contiguous())
