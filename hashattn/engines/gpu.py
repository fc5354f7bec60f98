"""Gpu: a fused decode step on an NVIDIA GPU, in CUDA C++ where that compiles and in Triton where it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hashattn.cache.kv_cache import KVCache
from hashattn.core.naming import short
from hashattn.core.types import Output, Selection
from hashattn.encoders.base import Encoder
from hashattn.engines.base import Answer, Call, Engine, PlanRow, PreparedStep, Request, part_name, selector_name
from hashattn.engines.gpus import this_gpu
from hashattn.engines.parts import Parts
from hashattn.engines.stages import Reference
from hashattn.ops import decode
from hashattn.ops.decode import why_not_encode
from hashattn.ops.decode.gpu import kernels, why_triton
from hashattn.ops.hamming import words


class Gpu(Engine):
    """Scan, choice and attention in two kernels; what a call asks beyond that, the reference does."""

    name, device = "gpu", "cuda"
    captures = True

    def why_not(self, parts: Parts, request: Request) -> list[str]:
        encoder, index, selector = parts.encoder, parts.index, parts.selector
        if encoder is None or index is None or selector is None or not index.flat_codes:
            return ["it serves binary codes in a FlatHamming index"]
        reasons = []
        if encoder.code_heads(request.kv_heads) != request.kv_heads:
            reasons.append("it serves one code a key, not one for each query head")
        if not parts.attend.fused:
            reasons.append(
                f"it attends as ExactAttend does, or MixedPrecision without a residual, not as {short(parts.attend)}"
            )
        rule = rule_of(parts, request.group)
        if rule is None:
            serves = 'TopK, LocalTopK, Threshold and Tiers (of a group, with combine="sum")'
            return [*reasons, f"it serves {serves}, not {short(selector)}"]
        reason = decode.why_not(
            device=request.device.type, dtype=request.dtype, head_dim=request.head_dim, group=request.group,
            tokens=request.tokens, words=words(encoder.bits), planes=encoder.query_bits, rule=rule,
            batch=request.batch,
        )  # fmt: skip
        return reasons if reason is None else [*reasons, reason]

    def prepare(self, parts: Parts, cache: KVCache, request: Request) -> PreparedStep:
        return FusedStep(parts, request)

    def crossover(self, parts: Parts, request: Request) -> int | None:
        found = this_gpu(request.device)
        return None if found is None else found[1].keys(request.key_bytes)

    def measured(self, request: Request) -> str:
        found = this_gpu(request.device)
        if found is None:
            return ""
        name, gpu = found
        captured = gpu.keys(request.key_bytes, captured=True)
        return f"{name}, {gpu.source}; in a CUDA graph a step wins from {captured:,} keys on"

    def rows(self, parts: Parts, request: Request) -> list[PlanRow]:
        gpu = request.device if torch.cuda.is_available() else None  # a plan may be of one that is not there
        rule = rule_of(parts, request.group)
        assert rule is not None and parts.encoder is not None
        slower, language = why_triton(gpu), kernels(gpu)
        if rule.critical is not None and parts.attend.needs_norms:
            slower, language = "estimates of medium keys are made there", "Triton"
        listed = "lists the keys near the last step's threshold"
        if rule.chunks is not None:
            listed = "keeps the nearest of each chunk"
        if slower is not None:
            listed += f"; {slower}"
        one = "the same kernel" if rule.chunks is not None and slower is None else "one kernel"
        selector, exact = selector_name(parts.selector), "exact, ties to the most recent key"
        return [
            _encode_row(parts.encoder, gpu),
            PlanRow("scan", f"{part_name(parts.index)}: {language}, one kernel", listed),
            PlanRow("select", f"{selector}: {language}, {one} with attend", exact),
            PlanRow("attend", f"{part_name(parts.attend)}: {language}", "split over the selected keys"),
        ]


def _encode_row(encoder: Encoder, gpu: torch.device | None) -> PlanRow:
    reason = why_not_encode(encoder.widths())
    if reason is not None:
        return PlanRow("encode", f"{part_name(encoder)}: PyTorch", reason)
    part = f"{part_name(encoder)}: {kernels(gpu)} in a decoder, else PyTorch"
    return PlanRow("encode", part, "a decoder appends in the same kernel")


def rule_of(parts: Parts, group: int) -> decode.Rule | None:
    """What the selector asks of a step over the encoder's codes, for so many heads a group; None if it is no Rule."""
    assert parts.selector is not None and parts.encoder is not None
    rule = parts.selector.rule(group)
    return None if rule is None else replace(rule, biased=parts.encoder.biased)


@dataclass(frozen=True)
class Prepared:
    """What steps like one another need of a cache: tensors that stay where they are, and the rule."""

    rule: decode.Rule
    keys: Tensor
    values: Tensor
    codes: Tensor
    norms: Tensor | None
    starts: Tensor
    bounds: Tensor
    workspace: Tensor
    estimate: decode.Estimate | None

    @classmethod
    def of(cls, parts: Parts, cache: KVCache, q_heads: int, tokens: int) -> Prepared:
        """For steps of so many query heads and queries, of parts that are served."""
        assert parts.encoder is not None
        rule = rule_of(parts, q_heads // cache.kv_heads)
        assert rule is not None
        keys, values, codes = (cache.storage(what) for what in ("keys", "values", "codes"))
        room = keys.shape[2], codes.shape[2]
        code = parts.encoder.query_bits, codes.shape[3]
        shape = cache.batch, q_heads, cache.kv_heads, tokens, cache.head_dim
        sizes = decode.Sizes(*shape, *room, *code, rule, parts.encoder.widths() or ((), ()))
        state, device = cache.on_device, keys.device
        starts, bounds = state.starts(cache._starts, device), state.bounds(sizes.state, device)
        norms = cache.storage("norms") if cache.with_norms else None
        estimate = parts.attend.fused_estimate(cache) if rule.critical is not None else None
        workspace = state.scratch.workspace(sizes.workspace, device)
        return cls(sizes.rule, keys, values, codes, norms, starts, bounds, workspace, estimate)

    def step(self, q: Tensor, query: Tensor, length: Tensor, scale: float, causal: bool) -> tuple[Output, Selection]:
        """Search and attend with queries and their codes; see :func:`hashattn.ops.decode.reference`."""
        from hashattn.ops.decode import library  # registers operators

        given = q, query, self.keys, self.values, self.codes, self.starts, length, self.bounds
        if self.estimate is None:
            out, lse, ids = library.decode(*given, self.rule, self.workspace, scale=scale, causal=causal)
            return Output(out, lse), Selection(ids)
        out, lse, ids, tier = library.decode_tiers(
            *given, self.estimate, self.rule, self.workspace, scale=scale, causal=causal
        )
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
        length = torch.full((1,), len(cache), dtype=torch.int32, device=q.device)
        query = packed(self.parts.encoder, q)
        prepared = Prepared.of(self.parts, cache, *q.shape[1:3])
        return prepared.step(q, query, length, call.scale, call.causal)


def wants_gradients(parts: Parts, q: Tensor, cache: KVCache) -> bool:
    """Whether a gradient of queries, keys, values or weights is wanted, which only the reference gives."""
    if not torch.is_grad_enabled():
        return False
    weights = parts.attend.parameters() if isinstance(parts.attend, nn.Module) else ()
    return q.requires_grad or cache.wants_grad or any(w.requires_grad for w in weights)
