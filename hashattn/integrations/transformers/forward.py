"""One forward pass of an attached model: what the hooks prepare and the attention function does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hashattn.attend.dense import dense
from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import Selection, Step
from hashattn.integrations.attached.report import LayerRecord
from hashattn.integrations.attached.tally import Ledger
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.given import attend_as_the_model, why_not_dropped, why_not_given
from hashattn.integrations.transformers.layers import Served
from hashattn.integrations.transformers.passes import Pass, Passes
from hashattn.integrations.transformers.simulate import attend_simulated, forced
from hashattn.integrations.transformers.static_layer import Arming, HashedStaticLayer
from hashattn.integrations.transformers.swap import hashed_layer
from hashattn.ops import decode

Rows = tuple[list[int], str | None]

HASHATTN_CALL, NO_CACHE = "hashattn_call", "no cache"


@dataclass
class Call:
    """What a hook tells the attention function: the layer's cache, or why there is none to search.

    Attributes:
        one: the forward pass that the call belongs to.
        mask, rows: the layer's mask, and what it says of the rows, where that was asked for.
        again: whether it is repeated for a backward pass (gradient checkpointing), and was counted before.
        reached: whether the attention function was called with it.
    """

    forward: Forward
    one: Pass
    number: int
    layer: HashedLayer | None
    reason: str | None
    mask: Tensor | None = None
    rows: Rows | None = None
    again: bool = False
    reached: bool = False

    @property
    def served(self) -> Served:
        return self.one.served[self.number]


@dataclass
class Forward:
    """What an attached model's layers share. What one tells the next in a forward pass belongs to its Pass."""

    served: dict[int, Served]
    records: dict[int, LayerRecord]
    strict: bool
    max_sparse_q: int
    trace: bool
    device: torch.device | None  # None where the model is spread over several
    simulated: bool = False
    passes: Passes = field(default_factory=Passes)

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

    def steps(self, cache: Any, tokens: int) -> bool:
        """Whether all layers of a pass are traced or captured, so that none of them tells the others anything."""
        return all(self.stepping(number, cache, tokens) is not False for number in self.served)

    @torch.compiler.disable
    def open(self, trunk: nn.Module, cache: Any, given: Any, batch: int, tokens: int) -> None:
        """Begin a forward pass of the model, before any of its layers has run.

        Args:
            trunk: what runs the layers.
            cache: what the model is given as its cache; None where it has none, or makes one itself.
            given: its attention mask.

        Raises:
            ValueError: a mask that cannot be served (strict), or a static cache that was outgrown.
            RuntimeError: a cache that another thread is using, or gradients that would ask layers out of turn.
        """
        config = getattr(trunk, "config", None)
        one = Pass(self.served, getattr(config, "num_hidden_layers", None), given)
        self.passes.open(one)
        if self.simulated:
            self._check_checkpoints(trunk)
        if isinstance(cache, Cache):
            self.passes.claim(one, cache)
            self._tell_outgrown(cache)
            for number, served in self.served.items():
                if served.attn is not None and number < len(layers_of(cache)):
                    support.check_room(cache.layers[number], tokens)
        if isinstance(cache, Cache) or self.simulated:
            self._check_given(one, cache, batch, tokens)

    @torch.compiler.disable
    def close(self) -> None:
        """End it, whether it came to its end or not."""
        self.passes.close()

    @torch.compiler.disable
    def prepare(self, number: int, cache: Any, hidden: Tensor, mask: Tensor | None) -> Call:
        """Swap the cache's layer for a hashed one. The first attention layer of a pass checks for all.

        Args:
            cache: what the model passes as its cache; None without one.
            hidden: the input of the attention module, [B, T, hidden size].
            mask: its attention mask.
        """
        one, again = self.passes.current(), recomputed()
        if one is None:  # a layer that is called by itself is a pass of its own
            one = Pass(self.served)
            if again and self.simulated:
                self._check_again(number)
        if one.interrupted:
            raise RuntimeError(
                f"layer {number} was called in a pass whose cache another call of the model has used meanwhile"
            )
        if not one.begun:
            self._begin(one, cache, hidden)
        served = one.served[number]
        if served.attn is None:
            return Call(self, one, number, None, served.dense, again=again)
        reason = self._why_not(cache, number, hidden)
        if reason is not None:
            return Call(self, one, number, None, reason, again=again)
        layer = cache.layers[number] if cache is not None and number < len(cache.layers) else None
        rows = self._rows(one, served, layer, hidden, mask)
        if cache is None:
            return Call(self, one, number, None, None, mask, rows, again)
        while len(cache.layers) <= number:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[number]
        if not isinstance(layer, HashedLayer) or not same_cache(layer.attn, served.attn):
            layer = cache.layers[number] = hashed_layer(layer, served.attn, one.scratch)
        layer.attn = served.attn
        return Call(self, one, number, layer, None, mask, rows, again)

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
            self._arm(call, call.layer, query.shape[1], mask)
        return result

    def _attend(
        self, call: Call, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        one, tokens = call.one, query.shape[2]
        kv = call.layer.kv if call.layer is not None else None
        if self.simulated and (tokens > 1 or kv is None):
            return attend_simulated(self, call, module, query, key, value, mask, scaling, **kwargs)
        reason = call.reason or NO_CACHE if kv is None else self._why_dense(call, query, kv, mask)
        if kv is None or reason is not None:
            one.step = Step()
            if kv is not None:
                self._observe(call, query, kv, mask, scaling)
            if kv is not None and key.shape[2] > len(kv):  # a static cache hands out its free columns as well
                key, value = kv.keys, kv.values
                mask = mask if mask is None else mask[..., : len(kv)]
            counted = kv is not None and tokens == 1 and (mask is None or mask.dtype == torch.bool)
            with self.ledger.guard:
                record = self.records[call.number]
                record.dense[str(reason)] += not call.again
                if kv is None and tokens == 1:
                    record.engine, record.why = "dense", str(reason)
                if kv is not None and counted:
                    self._count(call, None, query, kv, reason)
            if not counted:
                return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return dense(query, key, value, mask, scale).out.transpose(1, 2).contiguous(), None
        attn = self._searching(call, query)
        step = Step(call.number, one.step.previous, one.step.previous_weights)
        wants = attn.selector is not None and attn.selector.needs_weights
        output, selection = attn.run(query, kv, scale=scaling, step=step, need_weights=wants)
        one.step = Step(call.number, selection, output.weights if selection is not None else None)
        with self.ledger.guard:
            record = self.records[call.number]
            if selection is None:
                reason = "rows too short to be indexed"
                record.dense[reason] += not call.again
            else:
                record.sparse += not call.again
            if tokens == 1:
                self._count(call, selection, query, kv, reason)
        return output.out.transpose(1, 2).contiguous(), None

    @torch.compiler.disable
    def switched(self, number: int, implementation: str) -> None:
        """A layer that was given another attention function while attached; strict: raises ValueError."""
        self._refuse(
            f"its attention was set to {implementation!r} while attached, so that nothing is searched: call detach(), "
            "then set_attn_implementation(), then attach again"
        )
        for layer in self.ledger.armed():  # traced and captured steps would leave keys to us
            layer.settle()
            layer.armed = False
        self._note(number, f"attention was set to {implementation!r} while attached")

    @torch.compiler.disable
    def unreached(self, call: Call) -> None:
        """A layer that did not call the attention function; strict: raises ValueError."""
        reason = "the model did not call the attention function"
        self._refuse(f"{reason} in layer {call.number}, so that nothing is searched there")
        self._note(call.number, reason)

    def rows_of(self, call: Call, mask: Tensor | None, batch: int, keys: int, tokens: int) -> Rows:
        """The rows' first columns, and why the mask cannot be served (strict: raises ValueError)."""
        if call.rows is not None and call.mask is mask:  # the hook has read it
            return call.rows
        found = call.one.rows(mask, batch, keys, tokens)
        self._refuse(found[1])
        return found

    def rearm(self) -> None:
        """Let layers that are ready for traced and captured steps follow a change of the compositions."""
        for layer in self.ledger.armed():
            if layer.arming is not None and layer.kv is not None:
                layer.settle()
                served = self.served[layer.arming.number]
                layer.armed = False
                if served.attn is not None and same_cache(layer.attn, served.attn):
                    layer.attn = served.attn
                    self._arm_as_is(served, layer.arming.number, layer, layer.arming.q_heads)

    def disarm(self) -> None:
        """Leave all caches as the model's own code expects them."""
        for layer in self.ledger.armed():
            layer.settle()
            layer.armed = False
        self.ledger.close()

    # ---- inside

    def _note(self, number: int, reason: str) -> None:
        """Book a call that attends densely, for which no cost is known."""
        one = self.passes.current()
        if one is not None:
            one.step = Step()
        with self.ledger.guard:
            record = self.records[number]
            record.dense[reason] += not recomputed()
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
            reason = why_not_dropped(given) if call.served.dense is None else None
        if reason is not None:
            self._refuse(reason)
        return reason

    def _begin(self, one: Pass, cache: Any, hidden: Tensor) -> None:
        """Refuse what is to be refused, before the first attention layer of a pass changes anything."""
        if self.device not in (None, hidden.device) and not hidden.is_meta:  # the model was moved: parts follow
            self.device = hidden.device
            for served in one.served.values():
                served.composition.to(hidden.device)
        if isinstance(cache, Cache):
            if one.cache is not cache:  # made by the model, or a layer that is called by itself
                self._tell_outgrown(cache)
                one.uses(cache)
                self._check_given(one, cache, *hidden.shape[:2])
            for number, served in one.running.items():
                if served.attn is None:
                    continue
                self._why_not(cache, number, hidden)
                if number < len(layers_of(cache)):
                    support.check_append(cache.layers[number], hidden, self.device is not None)
        one.begun = True

    def _check_given(self, one: Pass, cache: Any, batch: int, tokens: int) -> None:
        """Refuse a mask by what the model itself was given, whatever layers come first (strict)."""
        numbers = [number for number, served in one.running.items() if searches(served)]
        if not self.strict or not numbers:
            return
        held = layers_of(cache)[numbers[0]] if numbers[0] < len(layers_of(cache)) else None
        self._refuse(one.why_not_given(batch, length(held) + tokens, tokens))

    def _check_checkpoints(self, trunk: nn.Module) -> None:
        checkpointed = trunk.training and torch.is_grad_enabled()
        if checkpointed and any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules()):
            for number in self.served:
                self._check_again(number)

    def _check_again(self, number: int) -> None:
        """Refuse to compute a layer again, alone, that asks for what the one before chose."""
        attn = self.served[number].attn
        if attn is not None and attn.selector is not None and attn.selector.follows:
            raise RuntimeError(
                f"layer {number} would be computed again for its gradient, without what the layer before chose, for "
                f"which {attn.selector!r} asks: switch gradient checkpointing off"
            )

    def _refuse(self, reason: str | None) -> None:
        if reason is not None and self.strict:
            raise ValueError(f"this call cannot be served: {reason} (attach with strict=False to run it densely)")

    def _rows(self, one: Pass, served: Served, layer: Any, hidden: Tensor, mask: Tensor | None) -> Rows | None:
        """What the mask says of the rows, read before the layer's cache grows; None where nobody asks."""
        assert served.attn is not None
        batch, tokens = hidden.shape[:2]
        looks = served.attn.selector is not None and served.attn.selector.observes
        asks = self.simulated or looks or tokens <= self.max_sparse_q or (self.strict and not one.vetted)
        if not searches(served) or not asks or (layer is None and not self.simulated):
            return None
        if mask is not None and not isinstance(mask, Tensor):  # of which the module makes its own
            return None
        found = one.rows(mask, batch, length(layer) + tokens, tokens)
        self._refuse(found[1])
        return found

    def _tell_outgrown(self, cache: Cache) -> None:
        """Adopt what traced or captured steps appended; raises ValueError if that was more than fitted."""
        errors = []
        for layer in layers_of(cache):
            if isinstance(layer, HashedStaticLayer):
                layer.settle()
                if layer.outgrown is not None:
                    errors.append(layer.outgrown)
                    layer.outgrown = None
        if errors:
            raise errors[0]

    def _arm(self, call: Call, layer: HashedStaticLayer, q_heads: int, mask: Tensor | None) -> None:
        """Make a static layer ready for traced and captured steps, if its next call may be one.

        Rows begin where the mask of this call says, its last query seeing all that the next one will.
        """
        kv = layer.kv
        if kv is None or self.trace or torch.is_grad_enabled() or kv.keys.device.type not in decode.request.DEVICES:
            return
        if mask is not None:
            starts, reason = call.one.beginnings(mask, kv.batch, len(kv))
            if reason is not None:
                return
            if starts != kv._starts:
                kv.set_start(torch.tensor(starts))
        self._arm_as_is(call.served, call.number, layer, q_heads)

    def _arm_as_is(self, served: Served, number: int, layer: HashedStaticLayer, q_heads: int) -> None:
        kv = layer.kv
        assert served.attn is not None and kv is not None
        if served.dense is None and served.attn.selector is not None and served.attn.selector.observes:
            return  # it has to see every query
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
            return NO_CACHE
        reason = support.why_not_input(hidden)
        if reason is None and cache is not None:
            reason = support.why_not_cache(cache, number)
        if reason is not None:
            self._refuse(reason)
        return reason

    def _why_dense(self, call: Call, query: Tensor, kv: KVCache, mask: Tensor | None) -> str | None:
        """Why this call of a served layer attends densely; None if it searches. Brings the rows' starts up to date."""
        if query.shape[2] > self.max_sparse_q:
            return "prefill"
        if call.served.dense is not None:
            return call.served.dense
        starts, reason = self.rows_of(call, mask, kv.batch, len(kv), query.shape[2])
        if reason is not None:
            return reason
        if starts != kv._starts:
            kv.set_start(torch.tensor(starts))
        attn = self._searching(call, query)
        if attn.engine_for(query, kv) == "dense":
            return "auto: dense is faster" if attn.engine == "auto" else "engine is dense"
        return None

    def _observe(self, call: Call, query: Tensor, kv: KVCache, mask: Tensor | None, scaling: float | None) -> None:
        """Show a dense call to a selector that looks back."""
        attn = self._searching(call, query)
        if attn.selector is None or not attn.selector.observes:
            return
        starts, reason = self.rows_of(call, mask, kv.batch, len(kv), query.shape[2])
        if reason is None:
            if starts != kv._starts:
                kv.set_start(torch.tensor(starts))
            attn.observe(query, kv, scale=scaling, step=Step(call.number))

    def _searching(self, call: Call, query: Tensor) -> HashAttention:
        """The composition of a layer that is not dense by choice."""
        attn = call.served.attn
        assert attn is not None
        return forced(attn, query.device) if self.simulated else attn

    def _count(self, call: Call, selection: Selection | None, query: Tensor, kv: KVCache, reason: str | None) -> None:
        """Book a one-token call; reason says why it ran dense."""
        if call.again:
            return
        record, attn = self.records[call.number], call.served.attn
        record.add_step(selection, query, kv, attn.selector if attn is not None else None)
        if reason is not None:
            record.engine, record.why = "dense", reason
        elif attn is not None:
            record.set_engine(attn, query, kv)
        if self.trace:
            heads = query.shape[1]
            ids = selection.ids if selection is not None else torch.arange(len(kv), device=query.device)
            record.add_reads(ids, heads // ids.shape[1] if selection is not None else heads, len(kv))


def layers_of(cache: Any) -> list[Any]:
    """A cache's layers; none where it has caches instead, or is none."""
    return getattr(cache, "layers", [])


def searches(served: Served) -> bool:
    """Whether calls of this layer may search, so that their masks matter."""
    return served.attn is not None and served.dense is None and served.attn.engine != "dense"


def length(layer: Any) -> int:
    """Columns that a layer of a cache holds."""
    if layer is None:
        return 0
    if isinstance(layer, HashedLayer):
        return len(layer.kv) if layer.kv is not None else 0
    return int(layer.get_seq_length())


def recomputed() -> bool:
    """Whether this call is made by a backward pass, to compute again what was not kept."""
    return torch._C._current_graph_task_id() != -1


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
