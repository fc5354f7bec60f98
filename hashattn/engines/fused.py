"""Fused steps, made ready for a cache: a call rewrites pointers and launches, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hashattn.cache.kv_cache import KVCache
from hashattn.core.lasting import lasting
from hashattn.core.types import Output, Selection, Step
from hashattn.engines.base import Answer, Call, Request
from hashattn.engines.parts import Parts
from hashattn.engines.stages import Reference
from hashattn.ops import decode
from hashattn.ops.decode.sizes import counters

if TYPE_CHECKING:
    from hashattn.ops.decode.library import Decode, Encode, EncodePlaced


POSITIONS = "positions"  # what ranks keys where there is no index
Learned = tuple[tuple[int, int], ...]


def rule_of(parts: Parts, group: int) -> decode.Rule | None:
    """What the selector asks of a step over the encoder's codes, for so many query heads a KV head; None if no rule.

    No keys are critical to a stage that attends to all of them alike.
    """
    assert parts.selector is not None
    rule = parts.selector.rule(group)
    if rule is None:
        return None
    critical = rule.critical if parts.attend.needs_norms else None
    return replace(rule, biased=parts.encoder is not None and parts.encoder.biased, critical=critical)


def asked_of(parts: Parts, request: Request) -> decode.KernelRequest | None:
    """What such a step asks of the kernels; None if the selector's choice is no rule of theirs."""
    rule, encoder, index = rule_of(parts, request.group), parts.encoder, parts.index
    if rule is None or (encoder is None) != (index is None):
        return None
    heads = request.q_heads, request.kv_heads, request.head_dim
    planes, words = (1, 0) if encoder is None else encoder.query_shape(request.head_dim)
    scores = POSITIONS if index is None else index.scores
    asked = decode.KernelRequest(request.device, request.dtype, *heads, words, planes, rule, scores)
    return replace(asked, batch=request.batch, tokens=request.tokens)


class Prepared:
    """A step that is made ready for a cache, whose tensors stay where they are.

    Args:
        searches: whether the kernels are made ready; otherwise they are when the first step searches.
    """

    def __init__(self, like: decode.Inputs, searches: bool) -> None:
        self.like, self._step = like, self._made(like) if searches else None

    @staticmethod
    def _made(like: decode.Inputs) -> Decode:
        from hashattn.ops.decode.library import Decode  # registers operators

        return Decode(like)

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
        searches: bool = True,
    ) -> Prepared:
        """A step of so many (query heads, queries), of parts that are served.

        Args:
            length: int32 [1], filled columns.
            centre: where the keys' centre stays, if not with the cache.
            searches: see the class.
        """
        encoder, index, state, device = parts.encoder, parts.index, cache.on_device, cache.keys.device
        rule = rule_of(parts, shape[0] // cache.kv_heads)
        assert rule is not None
        keys, values = (cache.storage(what).detach() for what in ("keys", "values"))
        codes = keys if index is None else cache.storage("codes").detach()
        stored = decode.Stored(keys, values, codes, length, cache.storage("norms") if cache.with_norms else None)
        estimate = parts.attend.fused_estimate(cache) if rule.critical is not None else None
        if estimate is not None and centre is not None:
            estimate = replace(estimate, centre=centre)
        q = torch.empty((cache.batch, *shape, cache.head_dim), dtype=keys.dtype, device=device)
        if index is not None and index.flat_codes and encoder is not None:
            planes = cache.batch, *shape, *encoder.query_shape(cache.head_dim)
            query = state.held("query", planes, torch.int64, device)
        else:
            query = packed(parts, q.zero_(), cache.kv_heads)
        starts = state.starts(cache._starts, device)
        like = decode.Inputs(q, query, stored, starts, rule, 1.0, causal, estimate)
        kind = {"scores": POSITIONS} if index is None else {"scores": index.scores, "page": index.page}
        like = replace(like, **kind)
        sizes = decode.sizes_of(like, None if encoder is None else encoder.widths())
        workspace = state.scratch.workspace(sizes.workspace, device)
        return cls(replace(like, bounds=state.bounds(sizes.state, device), workspace=workspace), searches)

    def step(
        self, q: Tensor, query: Tensor, scale: float, before: decode.Before | None = None, filled: int | None = None
    ) -> tuple[Output, Selection]:
        """Search and attend with queries and their codes; see :class:`hashattn.ops.decode.Inputs`.

        The Output has weights where the rule has a prior, the Selection so many filled slots, if that is known.
        """
        if self._step is None:
            self._step = self._made(self.like)
        out, lse, ids, tier, weights = self._step(q, query, scale, before)
        return Output(out, lse, weights), Selection(ids, tier, filled=filled)


def packed(parts: Parts, q: Tensor, kv_heads: int) -> Tensor:
    """Encoded queries as the kernels score keys with them, [B, Hq, T, P, W]; as they are where nothing is ranked."""
    if parts.encoder is None or parts.index is None:
        return q.unsqueeze(3)
    return parts.index.packed(parts.encoder.encode_query(q), kv_heads)


@dataclass(frozen=True, eq=False)
class Kept:
    """A step that is made ready, what it was made ready for, and the encoding before it.

    Attributes:
        fits: how often the encoder was fitted then.
        learned: what the weights of its selector and its attend stage were then; see :func:`learned_by`.
        frozen: where the centres of the cache's rows lay.
        encode: of its queries and of keys in place, in one launch that sets the length; None where PyTorch encodes.
    """

    parts: Parts
    fits: int
    learned: Learned
    frozen: Tensor | None
    prepared: Prepared
    encode: EncodePlaced | None

    @cached_property
    def append(self) -> Encode:
        """The same of keys that are not in place: they are appended. Only where there is `encode`."""
        from hashattn.ops.decode.library import Encode

        assert self.encode is not None
        x, keys = self.encode.like, self.encode.like.stored.keys
        k = keys.new_empty((*keys.shape[:2], x.q.shape[2], keys.shape[3]))
        written = x.arrived, x.workspace
        return Encode(decode.Newest(x.q, k, k, x.centre, x.maps, x.query_bits, x.stored, *written))

    @classmethod
    @lasting
    def of(cls, parts: Parts, cache: KVCache, shape: tuple[int, int], causal: bool) -> Kept:
        """For such (query heads, queries) and a cache all keys of which are encoded."""
        encoder, device, state, (q_heads, tokens) = parts.encoder, cache.keys.device, cache.on_device, shape
        length, frozen = state.held("length", (1,), torch.int32, device), cache.centres.frozen
        centre, encode = cache.centre, None
        if centre is not frozen:  # which stays where it is
            centre = state.held("centre", tuple(centre.shape), torch.float32, device).copy_(centre)
        centre = centre.contiguous()
        prepared = Prepared.of(parts, cache, shape, length, causal=causal, centre=centre)
        like = prepared.like
        encodes = encoder is not None and not decode.why_not_encode(encoder.widths())
        if encoder is not None and encodes and (frozen is None or frozen.is_contiguous()):
            from hashattn.ops.decode.library import EncodePlaced  # registers operators

            count = counters(cache.batch * q_heads * tokens, cache.batch * cache.kv_heads * tokens)
            arrived = state.held("arrived", (count,), torch.int32, device)
            maps, written = encoder.maps(cache.head_dim, device), (like.query, arrived, like.workspace)
            encode = EncodePlaced(decode.Placed(like.q, centre, maps, encoder.query_bits, like.stored, *written))
        return cls(parts, fits_of(parts), learned_by(parts), frozen, prepared, encode)

    def serves(self, parts: Parts, cache: KVCache) -> bool:
        """Whether it still is what such parts want of the cache; the memory is where it was."""
        same = self.parts is parts and self.fits == fits_of(parts) and self.frozen is cache.centres.frozen
        return same and self.learned == learned_by(parts)

    def filled(self, length: int, starts: list[int]) -> int | None:
        """Keys that a query of each row keeps, over rows and heads, where that is known without counting."""
        like = self.prepared.like
        if like.rule.radius is not None or like.rule.chunks is not None:
            return None
        heads = like.stored.keys.shape[1] if like.rule.shared else like.q.shape[1]
        return heads * sum(like.rule.slots(length - start) for start in starts)

    def suffices(self, cache: KVCache, length: int, waiting: int) -> bool:
        """Whether its own launch makes what codes are missing: none, or those of so many newest keys, its queries'."""
        stored = self.prepared.like.stored
        whole = self.encode is not None and waiting in (0, self.prepared.like.q.shape[2])
        return whole and all(cache.centres.ready) and length <= stored.codes.shape[2]


@dataclass(frozen=True, eq=False)
class FusedStep:
    """Steps of parts that are served: one launch encodes the newest keys and the queries, the next ones search."""

    parts: Parts
    request: Request

    def __call__(self, q: Tensor, cache: KVCache, call: Call) -> Answer:
        tokens, causal, length = q.shape[2], call.causal, len(cache)
        fewest = cache.shortest - (tokens - 1 if causal else 0)  # keys that the shortest-sighted query sees
        selector = self.parts.selector
        assert selector is not None
        asks = call.need_weights and not selector.needs_weights  # a step whose selector does gives its own
        if fewest < self.parts.warmup(cache) or asks or wants_gradients(self.parts, q, cache):
            return Reference().prepare(self.parts, self.request)(q, cache, call)
        kept, waiting = self.kept(q, cache, causal), length - cache.encoded
        if kept is None or not kept.suffices(cache, length, waiting):
            cache.encode()  # which may move the codes
            kept, waiting = self.kept(q, cache, causal) or self.make(q, cache, causal), 0
        query = self.encoded(kept, q, cache, length, waiting > 0)
        before = before_of(call.step) if selector.needs_weights else None
        filled = kept.filled(length, cache._starts) if tokens == 1 else None
        return kept.prepared.step(q, query, call.scale, before, filled)

    def encoded(self, kept: Kept, q: Tensor, cache: KVCache, length: int, new: bool) -> Tensor:
        """Queries as planes, and the length of the cache where steps read it; new: the newest keys' codes as well.

        Keys and values that are still coming are appended in the same launch, if they are those of the queries.
        """
        coming, first = cache.kv.coming, length - q.shape[2]
        if coming is not None and new and kept.encode is not None and coming[0].shape[2] == q.shape[2]:
            query = kept.append(q, *coming, first)
            cache.kv.wrote()
            cache.indexed.adopt(length)
            return query
        cache.kv.settle()
        if kept.encode is None:
            kept.prepared.like.stored.length.fill_(length)
            return packed(self.parts, q, cache.kv_heads)
        query = kept.encode(q, first, new)
        if new:
            cache.indexed.adopt(length)
        return query

    def kept(self, q: Tensor, cache: KVCache, causal: bool) -> Kept | None:
        """The step that was made ready; None if there is none, or its memory or another thing of it has changed."""
        state, device = cache.on_device, q.device
        held = state.prepared.get((q.shape[1], q.shape[2], causal))
        if not isinstance(held, Kept) or not held.serves(self.parts, cache) or state.memory != _memory(cache):
            return None
        state.starts(cache._starts, device)  # brings them up to date, in place
        workspace = held.prepared.like.workspace
        assert workspace is not None
        return held if state.scratch.workspace(workspace.nbytes, device) is workspace else None

    def make(self, q: Tensor, cache: KVCache, causal: bool) -> Kept:
        """It is kept with the cache, and made anew where its memory has moved or another has outgrown the workspace."""
        state, memory = cache.on_device, _memory(cache)
        if state.memory != memory:  # steps that were made ready before keep what it was alive
            state.memory, state.prepared = memory, {}
        kept = Kept.of(self.parts, cache, (q.shape[1], q.shape[2]), causal)
        if cache.centres.frozen is None or cache.centres.frozen.is_contiguous():  # else its centre is a copy
            state.prepared[q.shape[1], q.shape[2], causal] = kept
        return kept


def _memory(cache: KVCache) -> tuple[int, ...]:
    """Where keys, values, codes and norms lie."""
    codes = ["codes"] if cache.index is not None else []
    held = (*codes, *(["norms"] if cache.with_norms else []))
    return *cache.kv.addresses, *(cache.storage(what).data_ptr() for what in held)


def before_of(step: Step) -> decode.Before | None:
    """What the layer before kept; None if it ran dense, or its weights are not known."""
    if step.previous is None or step.previous_weights is None:
        return None
    return decode.Before(step.previous.ids, step.previous_weights.detach())


def fits_of(parts: Parts) -> int:
    """How often the encoder was fitted; 0 without one."""
    return parts.encoder.fits if parts.encoder is not None else 0


def learned_by(parts: Parts) -> Learned:
    """Where the weights of a selector and an attend stage lie, and how often they were written."""
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights_of(parts))


def weights_of(parts: Parts) -> list[Tensor]:
    """Of the selector and the attend stage."""
    modules = [*(parts.selector.weighted() if parts.selector is not None else ())]
    modules += [parts.attend] if isinstance(parts.attend, nn.Module) else []
    return [w for module in modules for w in module.parameters()]


def wants_gradients(parts: Parts, q: Tensor, cache: KVCache) -> bool:
    """Whether a gradient of queries, keys, values or weights is wanted, which only the reference gives."""
    if not torch.is_grad_enabled():
        return False
    return q.requires_grad or cache.wants_grad or any(w.requires_grad for w in weights_of(parts))
