"""Forward: what the hooks of an attached model share, and do before its layers run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from hashattn.core.types import Step
from hashattn.integrations.attached.counters import Counters
from hashattn.integrations.attached.layers import ServedLayer
from hashattn.integrations.attached.mask import Rows
from hashattn.integrations.attached.options import Options
from hashattn.integrations.attached.passes import Pass, Passes
from hashattn.integrations.transformers import caches, support
from hashattn.integrations.transformers.attention import NO_CACHE, LayerCall, count_unserved, recomputed
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.rollback import Beginning


class Forward:
    """The forward passes of an attached model. What one layer tells the next in a pass belongs to its Pass.

    Args:
        served: what serves the layers, by number.
        device: of the model; None where it is spread over several.
    """

    def __init__(self, served: dict[int, ServedLayer], options: Options, device: torch.device | None) -> None:
        self.served, self.options, self.device = served, options, device
        self.passes = Passes()
        self.counters: Counters[HashedLayer] = Counters(served)
        self._first = next((number for number, one in served.items() if one.attn is not None), 0)

    def __reduce__(self) -> tuple[type[Forward], tuple[Any, ...]]:
        """Copied or pickled, it has counted nothing yet and is in no pass."""
        return Forward, (self.served, self.options, self.device)

    def graph_layer(self, number: int, cache: Any, tokens: int) -> HashedLayer | bool:
        """Whether a call is traced or captured, and served so: the layer then, or True where it keeps the model's own.

        Traced itself, so that it asks no more than attributes.
        """
        own = self.served[number].attn is None
        number = self._first if own else number
        if not isinstance(cache, Cache) or number >= len(cache.layers):
            return False
        layer = cache.layers[number]
        if not isinstance(layer, HashedLayer) or not layer.in_graph(tokens):
            return False
        return own or layer

    def in_graph(self, cache: Any, tokens: int) -> bool:
        """Whether all layers of a pass are traced or captured, so that none of them tells the others anything."""
        return all(self.graph_layer(number, cache, tokens) is not False for number in self.served)

    @torch.compiler.disable
    def open(self, stack: nn.Module, cache: Any, mask: Any, batch: int, tokens: int) -> None:
        """Begin a forward pass of the model, before any of its layers has run.

        Args:
            stack: what runs the layers.
            cache: what the model is given as its cache; None where it has none, or makes one itself.
            mask: its attention mask, or those by type of layer.

        Raises:
            ValueError: a mask that cannot be served (strict), or a static cache without the room.
            RuntimeError: a cache that another thread is using, or gradients that would ask layers out of turn.
        """
        config = getattr(stack, "config", None)
        mask = mask.get("full_attention") if isinstance(mask, Mapping) else mask
        one = Pass(self.served, getattr(config, "num_hidden_layers", None), mask)
        self.passes.open(one)
        if self.options.simulate:
            self._check_checkpoints(stack)
        if isinstance(cache, Cache):
            self.passes.claim(one, cache, caches.scratch_of(cache))
            sync(cache)
            for number, served in self.served.items():
                if served.attn is not None and number < len(caches.layers_of(cache)):
                    caches.check_room(cache.layers[number], tokens)
            one.beginning = Beginning(caches.layers_of(cache), tokens)
        if isinstance(cache, Cache) or self.options.simulate:
            self._check_mask(one, cache, batch, tokens)

    @torch.compiler.disable
    def close(self, error: BaseException | None = None) -> None:
        """End it. An error that broke it off gives its cache back as it was, or says which layers are not."""
        one = self.passes.current()
        begun = one.beginning if one is not None and not one.interrupted else None
        lost = begun.restore() if error is not None and begun is not None else []
        if lost and error is not None:
            error.add_note(f"layers {lost} of its cache cannot take back what they were given: start with a new one")
        self.passes.close()

    @torch.compiler.disable
    def prepare(self, number: int, cache: Any, hidden: Tensor, mask: Tensor | None) -> LayerCall:
        """Swap the cache's layer for a hashed one. The first attention layer of a pass checks for all.

        Args:
            cache: what the model passes as its cache; None without one.
            hidden: the input of the attention module, [B, T, hidden size].
            mask: its attention mask.
        """
        one = self.passes.current()
        if one is None:  # a layer that is called by itself is a pass of its own
            one = Pass(self.served)
            if recomputed() and self.options.simulate:
                self._check_recomputed(number)
        if one.interrupted:
            raise RuntimeError(
                f"layer {number} was called in a pass whose cache another call of the model has used meanwhile"
            )
        if not one.checked:
            self._check(one, cache, hidden)
        served, call = one.served[number], LayerCall(self.options, self.counters, one, number)
        call.reason = served.why_dense if served.attn is None else self._why_not_cache(cache, number, hidden)
        if served.attn is None or call.reason is not None:
            return call
        layer = cache.layers[number] if cache is not None and number < len(cache.layers) else None
        call.mask, call.rows = mask, self._rows(one, served, layer, hidden, mask)
        if cache is None:
            return call
        while len(cache.layers) <= number:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[number]
        if not isinstance(layer, HashedLayer) or not caches.same_codes(layer.attn, served.attn):
            layer = cache.layers[number] = caches.hashed_layer(layer, served.attn, one.scratch)
        layer.attn, call.layer = served.attn, layer
        return call

    @torch.compiler.disable
    def switched(self, number: int, implementation: str) -> None:
        """A layer that was given another attention function while attached; strict: raises ValueError."""
        self.options.refuse(
            f"its attention was set to {implementation!r} while attached, so that nothing is searched: call detach(), "
            "then set_attn_implementation(), then attach again"
        )
        for layer in self.counters.followed():  # traced and captured steps would leave keys to us
            layer.release()
        self._run_unserved(number, f"attention was set to {implementation!r} while attached")

    @torch.compiler.disable
    def unreached(self, call: LayerCall) -> None:
        """A layer that did not call the attention function; strict: raises ValueError."""
        reason = "the model did not call the attention function"
        self.options.refuse(f"{reason} in layer {call.number}, so that nothing is searched there")
        self._run_unserved(call.number, reason)

    def update(self, served: dict[int, ServedLayer]) -> None:
        """Serve the layers otherwise from here on, those as well whose steps are traced or captured."""
        self.served = served
        for layer in self.counters.followed():
            made = layer.on_device.made
            if not layer.ready or made is None or layer.kv is None:
                continue
            layer.release()
            one = served[made.number]
            if one.attn is not None and caches.same_codes(layer.attn, one.attn):
                layer.attn = one.attn
                layer.serve_graphs(one, made.number, made.q_heads, self.counters, made.tokens, check=made.check)

    def release(self) -> None:
        """Leave all caches as the model's own code expects them."""
        for layer in self.counters.followed():
            layer.release()
        self.counters.close()

    # ---- inside

    def _run_unserved(self, number: int, reason: str) -> None:
        one = self.passes.current()
        if one is not None:
            one.step = Step()
        count_unserved(self.counters, number, reason)

    def _check(self, one: Pass, cache: Any, hidden: Tensor) -> None:
        """Refuse what is to be refused, before the first attention layer of a pass changes anything."""
        if self.device not in (None, hidden.device) and not hidden.is_meta:  # the model was moved: parts follow
            self.device = hidden.device
            for served in one.served.values():
                served.composition.to(hidden.device)
        if isinstance(cache, Cache):
            if one.cache is not cache:  # made by the model, or a layer that is called by itself
                sync(cache)
                one.use(cache, caches.scratch_of(cache))
                self._check_mask(one, cache, *hidden.shape[:2])
            for number, served in one.running.items():
                if served.attn is None:
                    continue
                self._why_not_cache(cache, number, hidden)
                if number < len(caches.layers_of(cache)):
                    caches.check_append(cache.layers[number], hidden, self.device is not None)
        one.checked = True

    def _check_mask(self, one: Pass, cache: Any, batch: int, tokens: int) -> None:
        """Refuse a mask by what the model itself was given, whatever layers come first (strict)."""
        numbers = [number for number, served in one.running.items() if served.why_never is None]
        if not self.options.strict or not numbers:
            return
        layers = caches.layers_of(cache)
        first = layers[numbers[0]] if numbers[0] < len(layers) else None
        self.options.refuse(one.why_not_mask(batch, caches.filled_columns(first) + tokens, tokens))

    def _check_checkpoints(self, stack: nn.Module) -> None:
        checkpointed = stack.training and torch.is_grad_enabled()
        if checkpointed and any(getattr(module, "gradient_checkpointing", False) for module in stack.modules()):
            for number in self.served:
                self._check_recomputed(number)

    def _check_recomputed(self, number: int) -> None:
        """Refuse to compute a layer again, alone, that asks for what the one before chose."""
        attn = self.served[number].attn
        if attn is not None and attn.selector is not None and attn.selector.follows:
            raise RuntimeError(
                f"layer {number} would be computed again for its gradient, without what the layer before chose, for "
                f"which {attn.selector!r} asks: switch gradient checkpointing off"
            )

    def _why_not_cache(self, cache: Any, number: int, hidden: Tensor) -> str | None:
        """Why this layer of the cache is not searched; raises ValueError if it should be (strict)."""
        if cache is None and not self.options.simulate:
            return NO_CACHE
        reason = support.why_not_input(hidden)
        if reason is None and cache is not None:
            reason = caches.why_not_cache(cache, number)
        self.options.refuse(reason)
        return reason

    def _rows(self, one: Pass, served: ServedLayer, layer: Any, hidden: Tensor, mask: Tensor | None) -> Rows | None:
        """What the mask says of the rows, read before the layer's cache grows; None where nobody asks."""
        batch, tokens = hidden.shape[:2]
        options = self.options
        searches = options.simulate or tokens <= options.max_sparse_q
        asks = searches or served.accumulates or (options.strict and not one.mask_checked)
        if served.why_never is not None or not asks or (layer is None and not options.simulate):
            return None
        if mask is not None and not isinstance(mask, Tensor):  # of which the module makes its own
            return None
        found = one.rows(mask, batch, caches.filled_columns(layer) + tokens, tokens)
        options.refuse(found[1])
        return found


def sync(cache: Cache) -> None:
    """Adopt what traced or captured steps appended; raises ValueError if that was more than fitted."""
    errors = []
    for layer in caches.layers_of(cache):
        if isinstance(layer, HashedLayer):
            layer.sync()
            if layer.on_device.overflow is not None:
                errors.append(layer.on_device.overflow)
                layer.on_device.overflow = None
    if errors:
        raise errors[0]
