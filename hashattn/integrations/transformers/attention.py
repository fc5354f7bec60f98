"""The attention function that is registered with transformers, and LayerCall: what a layer's hook tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.attend.dense import dense
from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import Selection, Step
from hashattn.engines.choose import DENSE
from hashattn.integrations.attached.choice import serving, why_dense
from hashattn.integrations.attached.counters import Counters
from hashattn.integrations.attached.layer_counts import TOO_SHORT
from hashattn.integrations.attached.layers import ServedLayer
from hashattn.integrations.attached.mask import Rows
from hashattn.integrations.attached.options import Options
from hashattn.integrations.attached.passes import Pass
from hashattn.integrations.attached.simulate import Simulation, visible_lengths
from hashattn.integrations.transformers.attention_arguments import AttentionArguments
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.static_layer import HashedStaticLayer
from hashattn.ops.decode import request

NAME, HASHATTN_CALL, NO_CACHE = "hashattn", "hashattn_call", "no cache"


def hashed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that is registered with transformers under NAME."""
    call: LayerCall | HashedLayer | None = keywords.pop(HASHATTN_CALL, None)
    if call is None:  # of a module that is not served, such as cross-attention
        return AttentionArguments(module, query, key, value, attention_mask, keywords).attend_as_the_model()
    if isinstance(call, HashedLayer):
        if call.recording:
            AttentionArguments(module, query, key, value, attention_mask, keywords).check_recorded(call.kv)
        return call.graph_step(query, key, value, keywords.get("scaling")).transpose(1, 2).contiguous(), None
    return call.attend(module, query, key, value, attention_mask, keywords)


@dataclass
class LayerCall:
    """A call of one layer: its cache, or why there is none to search.

    Attributes:
        one: the forward pass that the call belongs to.
        number: of the layer.
        layer: of the cache.
        reason: why that is not searched.
        mask, rows: the layer's mask, and what it says of the rows, where that was asked for.
        reached: whether the attention function was called with it.
    """

    options: Options
    counters: Counters[HashedLayer]
    one: Pass
    number: int
    layer: HashedLayer | None = None
    reason: str | None = None
    mask: Tensor | None = None
    rows: Rows | None = None
    reached: bool = False

    @property
    def served(self) -> ServedLayer:
        """What serves the layer."""
        return self.one.served[self.number]

    @property
    def kv(self) -> KVCache | None:
        """The layer's keys and values; None where it keeps the model's own."""
        return self.layer.kv if self.layer is not None else None

    @torch.compiler.disable  # a search asks the host for lengths and runs numpy: a graph breaks here
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        keywords: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the layer: query [B, Hq, T, D], key and value [B, Hkv, N, D]; returns [B, T, Hq, D]."""
        args = AttentionArguments(module, query, key, value, mask, keywords)
        reason = self._why_not(args)
        if reason is not None:
            self.one.step = Step()
            count_unserved(self.counters, self.number, reason)
            return args.attend_as_the_model()
        if self.options.simulate and (args.tokens > 1 or self.kv is None):
            result = self._simulate(args)
        else:
            result = self._search(args)
        if isinstance(self.layer, HashedStaticLayer):
            self._serve_graphs(self.layer, query.shape[1], mask)
        return result

    def _search(self, args: AttentionArguments) -> tuple[Tensor, None]:
        one, kv, query = self.one, self.kv, args.query
        reason = self.reason or NO_CACHE if kv is None else self._why_dense(args, kv)
        if kv is None or reason is not None:
            one.step = Step()
            return self._attend_densely(args, kv, str(reason))
        attn = self._searching(query)
        step = Step(self.number, one.step.previous, one.step.previous_weights)
        wants = attn.selector is not None and attn.selector.needs_weights
        output, selection = attn.run(query, kv, scale=args.scaling, step=step, need_weights=wants)
        one.step = Step(self.number, selection, output.weights if selection is not None else None)
        reason = TOO_SHORT if selection is None else None
        self._count(reason, selection, query, kv if args.tokens == 1 else None)
        return output.out.transpose(1, 2).contiguous(), None

    def _attend_densely(self, args: AttentionArguments, kv: KVCache | None, reason: str) -> tuple[Tensor, None]:
        if kv is not None:
            self._accumulate(args, kv)
        args = args.filled(kv)
        plain = args.mask is None or args.mask.dtype == torch.bool
        if kv is not None and args.few and plain:
            self._count(reason, None, args.query, None)
            return args.attend_few(), None
        if kv is None or args.tokens > 1 or not plain:
            self._count(reason, None, args.query, None)
            if kv is None and args.tokens == 1:
                with self.counters.guard:
                    self.counters.layers[self.number].served_by(DENSE.name, reason)
            return args.attend_by_sdpa()
        self._count(reason, None, args.query, kv)
        scale = args.query.shape[-1] ** -0.5 if args.scaling is None else args.scaling
        return dense(args.query, args.key, args.value, args.mask, scale).out.transpose(1, 2).contiguous(), None

    def _simulate(self, args: AttentionArguments) -> tuple[Tensor, None]:
        """Search for each of many queries, with or without a cache; layers that are dense by choice stay so."""
        one, attn, query, kv = self.one, self.served.attn, args.query, self.kv
        starts, reason = [0] * query.shape[0], self.reason or self.served.why_dense
        if reason is None:
            starts, reason = self._read_rows(args, len(kv) if kv is not None else args.key.shape[2])
        args = args.filled(kv)
        reason = reason or self.served.why_never
        if reason is not None or attn is None:
            one.blocks = []
            self._count(str(reason), None, query, None)
            if attn is not None and self.reason is None and not recomputed():
                keys = sum(visible_lengths(args.key.shape[2], args.tokens, starts))
                with self.counters.guard:
                    self.counters.layers[self.number].add_simulated_dense(query, args.key, keys, str(reason))
            return args.attend_by_sdpa()
        simulation = Simulation(attn, self.number, starts, args.scaling)
        out, one.blocks = simulation.attend(query, args.key, args.value, one.blocks)
        if not recomputed():
            with self.counters.guard:
                self.counters.layers[self.number].add_simulated(one.blocks, query.shape[1], attn.selector)
        return out.transpose(1, 2).contiguous(), None

    def _why_not(self, args: AttentionArguments) -> str | None:
        """Why what the model gives the attention function cannot be searched (strict: raises ValueError)."""
        repeated, self.reached = self.reached, True
        if self.layer is not None and self.kv is None:
            reason: str | None = "the model did not put its keys into the cache"
        else:
            reason = args.why_not(self.kv, repeated)
        searches = args.tokens <= self.options.max_sparse_q or self.options.simulate
        if reason is None and searches and self.reason is None and self.served.why_dense is None:
            reason = args.why_not_dropout
        self.options.refuse(reason)
        return reason

    def _why_dense(self, args: AttentionArguments, kv: KVCache) -> str | None:
        """Why this call of a served layer attends densely; None if it searches. Brings the rows' starts up to date."""
        if self.one.why_dense is not None:
            return self.one.why_dense
        if args.tokens > self.options.max_sparse_q:
            return "prefill"
        if self.served.why_dense is not None:
            return self.served.why_dense
        starts, reason = self._read_rows(args, len(kv))
        if reason is not None:
            return reason
        set_starts(kv, starts)
        return why_dense(self._searching(args.query), args.query, kv)

    def _accumulate(self, args: AttentionArguments, kv: KVCache) -> None:
        """Show a dense call to a selector that looks back."""
        if not self.served.accumulates:
            return
        starts, reason = self._read_rows(args, len(kv))
        if reason is None:
            set_starts(kv, starts)
            attn = self._searching(args.query)
            attn.accumulate(args.query, kv, scale=args.scaling, step=Step(self.number))

    def _read_rows(self, args: AttentionArguments, keys: int) -> Rows:
        """The rows' first columns, and why the mask cannot be served (strict: raises ValueError)."""
        if self.rows is not None and self.mask is args.mask:  # the hook has read it
            return self.rows
        found = self.one.rows(args.mask, args.query.shape[0], keys, args.tokens)
        self.options.refuse(found[1])
        return found

    def _searching(self, query: Tensor) -> HashAttention:
        """The composition of a layer that is not dense by choice."""
        attn = self.served.attn
        assert attn is not None
        return attn.searching(query.device) if self.options.simulate else attn

    def _count(self, reason: str | None, selection: Selection | None, query: Tensor, kv: KVCache | None) -> None:
        """Count a call; reason says why it ran dense, and kv is what a call of one token attended to."""
        if recomputed():
            return
        attn = self.served.attn
        with self.counters.guard:
            counts = self.counters.layers[self.number]
            if reason is None:
                counts.sparse += 1
            else:
                counts.dense[reason] += 1
            if kv is None:
                return
            waiting = counts.waiting
            counts.add_step(selection, query, kv, attn.selector if attn is not None else None)
            if reason is not None:
                counts.served_by(DENSE.name, reason)
            elif counts.waiting is None or counts.waiting is not waiting:  # steps that wait are all of one kind
                counts.served_by(*serving(self._searching(query), query, kv))
            if self.options.trace:
                heads = query.shape[1]
                ids = selection.ids if selection is not None else torch.arange(len(kv), device=query.device)
                counts.add_reads(ids, heads // ids.shape[1] if selection is not None else heads, len(kv))

    def _serve_graphs(self, layer: HashedStaticLayer, q_heads: int, mask: Tensor | None) -> None:
        """Make a static layer ready for traced and captured steps, if its next call may be one.

        Rows begin where the mask of this call says, its last query seeing all that the next one will.
        """
        kv = layer.kv
        if kv is None or self.options.trace or torch.is_grad_enabled() or kv.keys.device.type not in request.DEVICES:
            return
        if mask is not None:
            starts, reason = self.one.last_rows(mask, kv.batch, len(kv))
            if reason is not None:
                return
            set_starts(kv, starts)
        layer.serve_graphs(self.served, self.number, q_heads, self.counters)


def set_starts(kv: KVCache, starts: list[int]) -> None:
    """Let a cache's rows begin at these columns."""
    if starts != kv._starts:
        kv.set_start(torch.tensor(starts))


def count_unserved(counters: Counters[HashedLayer], number: int, reason: str) -> None:
    """Count a call that attends densely, for which no cost is known."""
    with counters.guard:
        counts = counters.layers[number]
        counts.dense[reason] += not recomputed()
        counts.served_by(DENSE.name, reason)


def recomputed() -> bool:
    """Whether this call is made by a backward pass, to compute again what was not kept."""
    return torch._C._current_graph_task_id() != -1
