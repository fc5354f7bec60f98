"""Gpu: a fused decode step on an NVIDIA GPU, in CUDA C++ where that compiles and in Triton where it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hashattn.cache.kv_cache import KVCache
from hashattn.core.lasting import lasting
from hashattn.core.naming import short
from hashattn.core.types import Output, Selection
from hashattn.encoders.base import Encoder
from hashattn.engines.base import Answer, Call, Engine, PlanRow, PreparedStep, Request, part_name, selector_name
from hashattn.engines.gpus import this_gpu
from hashattn.engines.parts import Parts
from hashattn.engines.stages import Reference
from hashattn.ops import decode
from hashattn.ops.hamming import words


class Gpu(Engine):
    """Scan, choice and attention in two kernels; what a call asks beyond that, the reference does."""

    name, device = "gpu", "cuda"
    captures = True

    def why_not(self, parts: Parts, request: Request) -> list[str]:
        encoder, index, selector = parts.encoder, parts.index, parts.selector
        if encoder is None or index is None or selector is None:
            return ["it serves binary codes in a FlatHamming index"]
        reasons = []
        if encoder.code_heads(request.kv_heads) != request.kv_heads:
            reasons.append("it serves one code a key, not one for each query head")
        if not parts.attend.fused:
            reasons.append(
                f"it attends as ExactAttend does, or MixedPrecision without a residual, not as {short(parts.attend)}"
            )
        asked = asked_of(parts, request)
        if asked is None:
            serves = 'TopK, LocalTopK, Threshold and Tiers (of a group, with combine="sum")'
            return [*reasons, f"it serves {serves}, not {short(selector)}"]
        return [*reasons, *decode.why_not(asked)]

    def prepare(self, parts: Parts, cache: KVCache, request: Request) -> PreparedStep:
        return FusedStep(parts, request)

    def crossover(self, parts: Parts, request: Request) -> int | None:
        found = this_gpu(request.device)
        return None if found is None else found[1].keys(request.key_bytes, request.captured)

    def measured(self, request: Request) -> str:
        found = this_gpu(request.device)
        if found is None:
            return ""
        name, gpu = found
        captured = gpu.keys(request.key_bytes, captured=True)
        return f"{name}, {gpu.source}; in a CUDA graph a step wins from {captured:,} keys on"

    def rows(self, parts: Parts, request: Request) -> list[PlanRow]:
        asked = asked_of(parts, request)
        assert asked is not None and parts.encoder is not None
        kernels, slower = decode.served_by(asked)
        language, chunks = kernels.language, asked.rule.chunks is not None
        listed = "keeps the nearest of each chunk" if chunks else "lists the keys near the last step's threshold"
        listed = "; ".join([listed, *slower])
        one = "the same kernel" if chunks and not slower else "one kernel"
        selector, exact = selector_name(parts.selector), "exact, ties to the most recent key"
        return [
            _encode_row(parts.encoder, request.device),
            PlanRow("scan", f"{part_name(parts.index)}: {language}, one kernel", listed),
            PlanRow("select", f"{selector}: {language}, {one} with attend", exact),
            PlanRow("attend", f"{part_name(parts.attend)}: {language}", "split over the selected keys"),
        ]


def _encode_row(encoder: Encoder, device: torch.device) -> PlanRow:
    reasons = decode.why_not_encode(encoder.widths())
    if reasons:
        return PlanRow("encode", f"{part_name(encoder)}: PyTorch", "; ".join(reasons))
    part = f"{part_name(encoder)}: {decode.kernels_on(device).language} in a decoder, else PyTorch"
    return PlanRow("encode", part, "a decoder appends in the same kernel")


def rule_of(parts: Parts, group: int) -> decode.Rule | None:
    """What the selector asks of a step over the encoder's codes, for so many query heads a KV head; None if no rule.

    No keys are critical to a stage that attends to all of them alike.
    """
    assert parts.selector is not None and parts.encoder is not None
    rule = parts.selector.rule(group)
    if rule is None:
        return None
    critical = rule.critical if parts.attend.needs_norms else None
    return replace(rule, biased=parts.encoder.biased, critical=critical)


def asked_of(parts: Parts, request: Request) -> decode.KernelRequest | None:
    """What such a step asks of the kernels; None if the selector's choice is no rule of theirs."""
    rule, encoder, index = rule_of(parts, request.group), parts.encoder, parts.index
    if rule is None or encoder is None or index is None:
        return None
    heads = request.q_heads, request.kv_heads, request.head_dim
    codes = words(encoder.bits), encoder.query_bits
    asked = decode.KernelRequest(request.device, request.dtype, *heads, *codes, rule, index.scores)
    return replace(asked, batch=request.batch, tokens=request.tokens)


class Prepared:
    """A step that is made ready for a cache, whose tensors stay where they are."""

    def __init__(self, like: decode.Inputs) -> None:
        from hashattn.ops.decode.library import Decode  # registers operators

        self.like, self._step = like, Decode(like)

    @classmethod
    @lasting
    def of(
        cls,
        parts: Parts,
        cache: KVCache,
        shape: tuple[int, int],
        length: Tensor,
        *,
        causal: bool = True,
        centre: Tensor | None = None,
    ) -> Prepared:
        """A step of so many (query heads, queries), of parts that are served.

        Args:
            length: int32 [1], filled columns.
            centre: where the keys' centre stays, if not with the cache.
        """
        encoder, state, device = parts.encoder, cache.on_device, cache.keys.device
        rule = rule_of(parts, shape[0] // cache.kv_heads)
        assert rule is not None and encoder is not None
        keys, values, codes = (cache.storage(what).detach() for what in ("keys", "values", "codes"))
        stored = decode.Stored(keys, values, codes, length, cache.storage("norms") if cache.with_norms else None)
        estimate = parts.attend.fused_estimate(cache) if rule.critical is not None else None
        if estimate is not None and centre is not None:
            estimate = replace(estimate, centre=centre)
        q = torch.empty((cache.batch, *shape, cache.head_dim), dtype=keys.dtype, device=device)
        planes = cache.batch, *shape, encoder.query_bits, codes.shape[3]
        query = torch.empty(planes, dtype=torch.int64, device=device)
        starts, scores = state.starts(cache._starts, device), parts.index.scores if parts.index is not None else ""
        like = decode.Inputs(q, query, stored, starts, rule, 1.0, causal, estimate, scores=scores)
        sizes = replace(decode.Sizes.of(like), widths=encoder.widths() or ((), ()))
        workspace = state.scratch.workspace(sizes.workspace, device)
        return cls(replace(like, bounds=state.bounds(sizes.state, device), workspace=workspace))

    def step(self, q: Tensor, query: Tensor, scale: float) -> tuple[Output, Selection]:
        """Search and attend with queries and their codes; see :class:`hashattn.ops.decode.Inputs`."""
        out, lse, ids, tier = self._step(q, query, scale)
        return Output(out, lse), Selection(ids, tier)


def packed(encoder: Encoder, q: Tensor) -> Tensor:
    """Encoded queries as int64 [B, Hq, T, P, W]."""
    query = encoder.encode_query(q)
    return (query if query.ndim == 5 else query.unsqueeze(3)).contiguous()


@dataclass(frozen=True, eq=False)
class FusedStep:
    """Steps of parts that are served, launched without waiting for the device."""

    parts: Parts
    request: Request

    def __call__(self, q: Tensor, cache: KVCache, call: Call) -> Answer:
        fewest = cache.shortest - (q.shape[2] - 1 if call.causal else 0)  # keys that the shortest-sighted query sees
        if fewest < self.parts.warmup(cache) or call.need_weights or wants_gradients(self.parts, q, cache):
            return Reference().prepare(self.parts, cache, self.request)(q, cache, call)
        assert self.parts.encoder is not None
        cache.encode()
        query, prepared = packed(self.parts.encoder, q), self.prepared(q, cache, call.causal)
        prepared.like.stored.length.fill_(len(cache))
        return prepared.step(q, query, call.scale)

    def prepared(self, q: Tensor, cache: KVCache, causal: bool) -> Prepared:
        """Kept with the cache, and made anew where its memory has moved or another step has outgrown the workspace."""
        parts, state, device = self.parts, cache.on_device, q.device
        state.starts(cache._starts, device)  # brings them up to date, in place
        memory = tuple(cache.storage(what).data_ptr() for what in ("keys", "values", "codes"))
        if state.memory != memory:  # steps that were made ready before keep what it was alive
            state.memory, state.prepared = memory, {}
        held, like = state.prepared.get((q.shape[1], q.shape[2], causal)), None
        if isinstance(held, Kept) and held.parts is parts:
            like = held.prepared.like
            assert like.workspace is not None
            if state.scratch.workspace(like.workspace.nbytes, device) is like.workspace:
                return held.prepared
        length = torch.empty(1, dtype=torch.int32, device=device) if like is None else like.stored.length
        prepared = Prepared.of(parts, cache, (q.shape[1], q.shape[2]), length, causal=causal)
        if prepared.like.estimate is None:  # whose centre moves
            state.prepared[q.shape[1], q.shape[2], causal] = Kept(parts, prepared)
        return prepared


class Kept(NamedTuple):
    """A prepared step, and what it was prepared for."""

    parts: Parts
    prepared: Prepared


def wants_gradients(parts: Parts, q: Tensor, cache: KVCache) -> bool:
    """Whether a gradient of queries, keys, values or weights is wanted, which only the reference gives."""
    if not torch.is_grad_enabled():
        return False
    weights = parts.attend.parameters() if isinstance(parts.attend, nn.Module) else ()
    return q.requires_grad or cache.wants_grad or any(w.requires_grad for w in weights)
