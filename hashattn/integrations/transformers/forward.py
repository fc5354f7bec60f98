"""One forward pass of an attached model: what the hooks prepare and the attention function does."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hashattn.attend.dense import dense
from hashattn.attention import HashAttention
from hashattn.cache import KVCache
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.given import attend_as_the_model, why_not_dropped, why_not_given
from hashattn.integrations.transformers.layers import Served
from hashattn.integrations.transformers.mask import read_mask
from hashattn.integrations.transformers.report import LayerRecord
from hashattn.integrations.transformers.simulate import Block, attend_simulated, forced
from hashattn.integrations.transformers.static_layer import Arming, HashedStaticLayer
from hashattn.integrations.transformers.swap import hashed_layer
from hashattn.integrations.transformers.tally import Ledger
from hashattn.ops import decode
from hashattn.ops.decode import Scratch
from hashattn.types import Selection, Step

HASHATTN_CALL = "hashattn_call"


@dataclass
class Call:
    """What a hook tells the attention function: the layer's cache, or why there is none to search.

    Attributes:
        reached: whether the attention function was called with it.
    """

    forward: Forward
    number: int
    layer: HashedLayer | None
    reason: str | None
    reached: bool = False


@dataclass
class Forward:
    """What an attached model's layers share, and what one tells the next in a forward pass."""

    served: dict[int, Served]
    records: dict[int, LayerRecord]
    strict: bool
    max_sparse_q: int
    trace: bool
    device: torch.device | None  # None where the model is spread over several
    simulated: bool = False
    step: Step = field(default_factory=Step)
    blocks: list[Block] = field(default_factory=list)  # what `step` is to simulated calls
    scratch: Scratch = field(default_factory=Scratch)
    masked: tuple[Tensor, list[int], str | None] | None = None
    beginning: tuple[weakref.ref[Tensor], list[int], str | None] | None = None  # what a call's last query says of rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied or pickled, it has counted nothing yet and is in no pass."""
        records = {number: LayerRecord() for number in self.records}
        arguments = (self.served, records, self.strict, self.max_sparse_q, self.trace, self.device, self.simulated)
        return Forward, arguments

    def __post_init__(self) -> None:
        unserved = {i: str(served.dense) for i, served in self.served.items() if served.attn is None}
        self.ledger = Ledger(self.records, unserved)
        self.first = next((i for i in self.served if i not in unserved), 0)

    def stepping(self, number: int, cache: Any, tokens: int) -> HashedStaticLayer | bool:
        """Whether a call is traced or captured, and served so: the layer then, or True where it keeps the model's own.

        Traced itself, so that it asks no more than attributes.
        """
        own = self.served[number].attn is None
        number = self.first if own else number
        if not isinstance(cache, StaticCache) or number >= len(cache.layers):
            return False
        layer = cache.layers[number]
        if not isinstance(layer, HashedStaticLayer) or not layer.steps(tokens):
            return False
        return own or layer

    @torch.compiler.disable
    def prepare(self, number: int, cache: Any, hidden: Tensor) -> Call:
        """Swap the cache's layer for a hashed one. The first layer of a pass checks for all, before any work is done.

        Args:
            cache: what the model passes as its cache; None without one.
            hidden: the input of the attention module, [B, T, hidden size].
        """
        if number == next(iter(self.served)):
            self._begin(cache, hidden)
        served = self.served[number]
        if served.attn is None:
            return Call(self, number, None, served.dense)
        reason = self._why_not(cache, number, hidden)
        if reason is not None or cache is None:
            return Call(self, number, None, reason)
        while len(cache.layers) <= number:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[number]
        if not isinstance(layer, HashedLayer) or not same_cache(layer.attn, served.attn):
            layer = cache.layers[number] = hashed_layer(layer, served.attn, self.scratch)
        layer.attn = served.attn
        return Call(self, number, layer, None)

    @torch.compiler.disable  # a search asks the host for lengths and runs numpy: a graph breaks here
    def attend(
        self, call: Call, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention of one layer: query [B, Hq, T, D], key and value [B, Hkv, N, D]; returns [B, T, Hq, D]."""
        reason = self._why_not_given(call, query, key, value, kwargs)
        if reason is not None:
            self._note(call.number, reason)
            return attend_as_the_model(module, query, key, value, mask, scaling, kwargs)
        result = self._attend(call, module, query, key, value, mask, scaling, **kwargs)
        if isinstance(call.layer, HashedStaticLayer):
            self._arm(call.number, call.layer, query.shape[1], mask)
        return result

    def _attend(
        self, call: Call, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        record, tokens = self.records[call.number], query.shape[2]
        kv = call.layer.kv if call.layer is not None else None
        if self.simulated and (tokens > 1 or kv is None):
            return attend_simulated(self, call, module, query, key, value, mask, scaling, **kwargs)
        reason = call.reason if kv is None else self._why_dense(call.number, query, kv, mask)
        if kv is None or reason is not None:
            record.dense[str(reason)] += 1
            self.step = Step()
            if kv is not None and key.shape[2] > len(kv):  # a static cache hands out its free columns as well
                key, value = kv.keys, kv.values
                mask = mask if mask is None else mask[..., : len(kv)]
            if kv is not None:
                self._observe(call.number, query, kv, mask, scaling)
            if kv is None and tokens == 1:
                record.engine, record.why = "dense", str(reason)
            if kv is None or tokens > 1 or (mask is not None and mask.dtype != torch.bool):
                return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
            self._count(call.number, None, query, kv, reason)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return dense(query, key, value, mask, scale).out.transpose(1, 2).contiguous(), None
        attn = self._searching(call.number, query)
        step = Step(call.number, self.step.previous, self.step.previous_weights)
        wants = attn.selector is not None and attn.selector.needs_weights
        output, selection = attn.run(query, kv, scale=scaling, step=step, need_weights=wants)
        if selection is None:
            reason = "rows too short to be indexed"
            record.dense[reason] += 1
        else:
            record.sparse += 1
        self.step = Step(call.number, selection, output.weights if selection is not None else None)
        if tokens == 1:
            self._count(call.number, selection, query, kv, reason)
        return output.out.transpose(1, 2).contiguous(), None

    @torch.compiler.disable
    def switched(self, number: int, implementation: str) -> None:
        """A layer that was given another attention function while attached; strict: raises ValueError."""
        self._refuse(
            f"its attention was set to {implementation!r} while attached, so that nothing is searched: call detach(), "
            "then set_attn_implementation(), then attach again"
        )
        for layer in list(self.ledger.layers):  # traced and captured steps would leave keys to us
            layer.settle()
            layer.armed = False
        self._note(number, f"attention was set to {implementation!r} while attached")

    @torch.compiler.disable
    def unreached(self, call: Call) -> None:
        """A layer that did not call the attention function; strict: raises ValueError."""
        reason = "the model did not call the attention function"
        self._refuse(f"{reason} in layer {call.number}, so that nothing is searched there")
        self._note(call.number, reason)

    def starts_of(self, mask: Tensor | None, batch: int, keys: int, tokens: int) -> tuple[list[int], str | None]:
        """The rows' first columns, and why the mask cannot be served (strict: raises ValueError)."""
        if mask is None:
            return [0] * batch, None
        if self.masked is None or self.masked[0] is not mask:
            self.masked = (mask, *read_mask(mask, batch, keys, tokens))
        _, starts, reason = self.masked
        if reason is not None and self.strict:
            raise ValueError(f"{reason} (attach with strict=False to run such calls densely)")
        return starts, reason

    def forget(self) -> None:
        """Let go of what the last pass left."""
        self.step, self.masked, self.blocks = Step(), None, []

    def rearm(self) -> None:
        """Let layers that are ready for traced and captured steps follow a change of the compositions."""
        for layer in list(self.ledger.layers):
            if layer.armed and layer.arming is not None and layer.kv is not None:
                layer.settle()
                served = self.served[layer.arming.number]
                layer.armed = False
                if served.attn is not None and same_cache(layer.attn, served.attn):
                    layer.attn = served.attn
                    self._arm_as_is(layer.arming.number, layer, layer.arming.q_heads)

    def disarm(self) -> None:
        """Leave all caches as the model's own code expects them."""
        for layer in list(self.ledger.layers):
            layer.settle()
            layer.armed = False
        self.ledger.close()

    # ---- inside

    def _refuse(self, reason: str) -> None:
        if self.strict:
            raise ValueError(f"this call cannot be served: {reason} (attach with strict=False to run it densely)")

    def _note(self, number: int, reason: str) -> None:
        """Book a call that attends densely, for which no cost is known."""
        self.step, record = Step(), self.records[number]
        record.dense[reason] += 1
        record.engine, record.why = "dense", reason

    def _why_not_given(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]
    ) -> str | None:  # fmt: skip
        """Why what the model gives the attention function cannot be searched (strict: raises ValueError)."""
        again, call.reached = call.reached, True
        kv = call.layer.kv if call.layer is not None else None
        if call.layer is not None and kv is None:
            reason: str | None = "the model did not put its keys into the cache"
        else:
            reason = why_not_given(kv, key, value, again, given)
        if reason is None and (query.shape[2] <= self.max_sparse_q or self.simulated) and call.reason is None:
            reason = why_not_dropped(given) if self.served[call.number].dense is None else None
        if reason is not None:
            self._refuse(reason)
        return reason

    def _begin(self, cache: Any, hidden: Tensor) -> None:
        self.forget()
        if self.device not in (None, hidden.device) and not hidden.is_meta:  # the model was moved: parts follow
            self.device = hidden.device
            for served in self.served.values():
                served.composition.to(hidden.device)
        if not isinstance(cache, Cache):
            return
        self._tell_outgrown(cache)
        for number, served in self.served.items():
            if served.attn is None or number >= len(cache.layers):
                continue
            self._why_not(cache, number, hidden)
            support.check_append(cache.layers[number], hidden, self.device is not None)

    def _tell_outgrown(self, cache: Cache) -> None:
        """Adopt what traced or captured steps appended; raises ValueError if that was more than fitted."""
        errors = []
        for layer in cache.layers:
            if isinstance(layer, HashedStaticLayer):
                layer.settle()
                if layer.outgrown is not None:
                    errors.append(layer.outgrown)
                    layer.outgrown = None
        if errors:
            raise errors[0]

    def _arm(self, number: int, layer: HashedStaticLayer, q_heads: int, mask: Tensor | None) -> None:
        """Make a static layer ready for traced and captured steps, if its next call may be one.

        Rows begin where the mask of this call says, its last query seeing all that the next one will.
        """
        kv = layer.kv
        if kv is None or self.trace or torch.is_grad_enabled() or kv.keys.device.type not in decode.DEVICES:
            return
        if mask is not None:
            if self.beginning is None or self.beginning[0]() is not mask:  # the mask of a long prompt is large
                self.beginning = (weakref.ref(mask), *read_mask(mask[:, :, -1:], kv.batch, len(kv), 1))
            _, starts, reason = self.beginning
            if reason is not None:
                return
            if starts != kv._starts:
                kv.set_start(torch.tensor(starts))
        self._arm_as_is(number, layer, q_heads)

    def _arm_as_is(self, number: int, layer: HashedStaticLayer, q_heads: int) -> None:
        served, kv = self.served[number], layer.kv
        assert served.attn is not None and kv is not None
        attn, why = served.attn, f'engine="{served.attn.engine}"'
        engine = attn.engine_for(kv.keys.new_empty((kv.batch, q_heads, 1, kv.head_dim)), kv)
        if served.dense is not None or engine == "dense":
            attn = attn.replace(engine="dense")
            why = served.dense or ("auto: dense is faster" if served.attn.engine == "auto" else "engine is dense")
        elif engine != "triton":
            return
        elif attn.engine == "auto":
            why = f"auto, faster from {kv.crossover} keys on"
        layer.arm(Arming(attn, number, q_heads, why, self.ledger))

    def _why_not(self, cache: Any, number: int, hidden: Tensor) -> str | None:
        """Why this layer of the cache is not searched; raises ValueError if it should be (strict)."""
        if cache is None and not self.simulated:
            return "no cache"
        reason = support.why_not_input(hidden)
        if reason is None and cache is not None:
            reason = support.why_not_cache(cache, number)
        if reason is not None:
            self._refuse(reason)
        return reason

    def _why_dense(self, number: int, query: Tensor, kv: KVCache, mask: Tensor | None) -> str | None:
        """Why this call of a served layer attends densely; None if it searches. Brings the rows' starts up to date."""
        if query.shape[2] > self.max_sparse_q:
            return "prefill"
        served = self.served[number]
        if served.dense is not None:
            return served.dense
        starts, reason = self.starts_of(mask, kv.batch, len(kv), query.shape[2])
        if reason is not None:
            return reason
        if starts != kv._starts:
            kv.set_start(torch.tensor(starts))
        assert served.attn is not None
        if self._searching(number, query).engine_for(query, kv) == "dense":
            return "auto: dense is faster" if served.attn.engine == "auto" else "engine is dense"
        return None

    def _observe(
        self, number: int, query: Tensor, kv: KVCache, mask: Tensor | None, scaling: float | None
    ) -> None:  # fmt: skip
        """Show a dense call to a selector that looks back."""
        attn = self._searching(number, query)
        if attn.selector is None or not attn.selector.observes:
            return
        starts, reason = self.starts_of(mask, kv.batch, len(kv), query.shape[2])
        if reason is None:
            if starts != kv._starts:
                kv.set_start(torch.tensor(starts))
            attn.observe(query, kv, scale=scaling, step=Step(number))

    def _searching(self, number: int, query: Tensor) -> HashAttention:
        """The composition of a layer that is not dense by choice."""
        attn = self.served[number].attn
        assert attn is not None
        return forced(attn, query.device) if self.simulated else attn

    def _count(self, number: int, selection: Selection | None, query: Tensor, kv: KVCache, reason: str | None) -> None:
        """Book a one-token call; reason says why it ran dense."""
        record, attn = self.records[number], self.served[number].attn
        record.add_step(selection, query, kv)
        if reason is not None:
            record.engine, record.why = "dense", reason
        elif attn is not None:
            record.set_engine(attn, query, kv)
        if self.trace:
            heads = query.shape[1]
            ids = selection.ids if selection is not None else torch.arange(len(kv), device=query.device)
            record.add_reads(ids, heads // ids.shape[1] if selection is not None else heads, len(kv))


def same_cache(held: HashAttention, wanted: HashAttention) -> bool:
    """Whether caches of one composition serve the other."""
    if held is wanted:
        return True
    norms = held.attend.needs_norms or not wanted.attend.needs_norms
    return held.encoder == wanted.encoder and held.index == wanted.index and norms


def hashed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention function that is registered with transformers under the name "hashattn"."""
    call: Call | HashedStaticLayer | None = kwargs.pop(HASHATTN_CALL, None)
    if call is None:  # of a module that is not served, such as cross-attention
        return attend_as_the_model(module, query, key, value, attention_mask, scaling, kwargs)
    if isinstance(call, HashedStaticLayer):
        assert call.decoder is not None
        out = call.decoder.step(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return out.transpose(1, 2).contiguous(), None
    return call.forward.attend(call, module, query, key, value, attention_mask, scaling, **kwargs)
