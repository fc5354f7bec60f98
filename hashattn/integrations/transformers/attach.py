"""attach(): put a composition to work in a model. Handle: what is at work there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hashattn.attention import HashAttention
from hashattn.integrations.attached.choice import check_engine
from hashattn.integrations.attached.layers import ServedLayer, layer_compositions, layer_numbers
from hashattn.integrations.attached.options import GRAPH, Options
from hashattn.integrations.attached.report import Report, summarise
from hashattn.integrations.attached.update import revised
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.attention_module import devices_of, dtype_of, heads
from hashattn.integrations.transformers.forward import Forward
from hashattn.integrations.transformers.hooks import Hooks, is_attached
from hashattn.integrations.transformers.model_facts import check_facts


@dataclass
class Handle:
    """A composition at work in a model, until detach(). Also a context manager.

    Made by attn.attach(model); see :func:`attach`.

    Attributes:
        attn: the composition of all layers that were not given one of their own.
        model: the attached model.
        refused: why the model was left as it is (only without strict).
    """

    attn: HashAttention
    model: nn.Module
    refused: tuple[str, ...]
    _hooks: Hooks | None  # None where the model was left as it is

    def update(self, *, layers: Iterable[int] | None = None, **changes: Any) -> None:
        """Change compositions while attached; the next call uses them. If anything is refused, nothing has changed.

        Caches stay as they are, unless encoder, index or norms change: then they are encoded anew at their next use.
        Parts with weights keep them.

        Args:
            layers: which layers; negative numbers count from the last. All that are served by default.
            changes: parts by name (encoder, index, selector, attend, engine, dense_layers), or what
                :meth:`Selector.revised` takes: k or share for the whole budget, forced keys and samples included;
                min_k, t1, t2, radius, limit, per, combine and the like; sinks and recent for the forced keys.

        Raises:
            TypeError: a name that is neither part nor field; the nearest known one is named.
            ValueError: a value that its part refuses, parts that do not fit the model, a layer that is not served.
            RuntimeError: the handle is detached.
        """
        hooks = self._hooks
        if hooks is None:
            self.attn = revised(self.attn, changes)
            return
        if not hooks.handles:
            raise RuntimeError("this handle is detached: attach the composition again")
        served, modules = hooks.forward.served, hooks.modules
        depth = support.depth_of(self.model, modules)
        chosen = list(served) if layers is None else layer_numbers("layers", layers, modules, depth)
        if layers is not None and "dense_layers" in changes:
            raise ValueError('dense_layers is for all layers; with layers=, engine="dense" makes single ones dense')
        for i in chosen:
            if layers is not None and served[i].attn is None:
                raise ValueError(f"layers names layer {i}, which is not served: {served[i].why_dense}")
        attn = revised(self.attn, changes) if layers is None else self.attn
        new = dict(served)
        for i in chosen:
            composition = _revised_layer(served[i], i, changes)
            check_facts(composition, self.model)
            new[i] = serve(composition, served[i].own, modules[i], i, depth)
        for one in new.values():
            one.composition.to(hooks.forward.device or devices_of(modules)[0])
        self.attn = attn
        hooks.forward.update(new)
        if hooks.graphs is not None:
            hooks.graphs.clear()

    def report(self) -> Report:
        """What ran so far, per layer: sparse, dense by choice, dense because; keys and bytes read; engine and why."""
        if self._hooks is None:
            return summarise({}, self.refused)
        graphs = self._hooks.graphs
        return replace(self._hooks.forward.counters.report(), graph=None if graphs is None else graphs.use())

    def reads(self) -> Tensor:
        """How often each position was read by one-token calls: int64 [layers, positions]. Needs trace=True."""
        if self._hooks is None or not self._hooks.forward.options.trace:
            raise RuntimeError("reads are counted with attach(model, trace=True) only, in models that are served")
        return self._hooks.forward.counters.reads()

    def reset_report(self) -> None:
        """Start counting anew."""
        if self._hooks is not None:
            self._hooks.forward.counters.reset()
            if self._hooks.graphs is not None:
                self._hooks.graphs.reset()

    def detach(self) -> None:
        """Give the model back exactly as it was, also in the middle of generate(). Calling it again does nothing.

        Caches made meanwhile stay usable: without the hooks they are attended to in full.
        """
        if self._hooks is not None and self._hooks.handles:
            self._hooks.remove(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def attach(
    attn: HashAttention,
    model: nn.Module,
    *,
    strict: bool = True,
    max_sparse_q: int = 1,
    trace: bool = False,
    simulate: bool = False,
    layers: Mapping[int, HashAttention] | None = None,
    graph: str = GRAPH,
) -> Handle:
    """Let a composition serve the decoding of a Hugging Face causal language model.

    model.generate(**inputs) then works with no argument added. Prefill stays dense; a call with at most
    `max_sparse_q` queries searches. Sliding-window layers and attn.dense_layers stay dense.

    Args:
        attn: the composition; its weights are moved to the model's device.
        model: a decoder model that uses transformers' attention interface.
        strict: refuse models, caches and masks that cannot be served. Without it they run densely, as report() says.
        max_sparse_q: queries of a call up to which it searches; raise it for speculative decoding.
        trace: count which positions are read; see Handle.reads().
        simulate: every call, however long, searches at every position: each query chooses among the keys up to its own
            as if it were decoded, with or without a cache. For likelihoods (one long forward); it saves no time.
            "auto" then searches at every length; `max_sparse_q` and `trace` concern calls of one token only.
        layers: compositions for single layers, such as {3: other, -1: attn.replace(engine="dense")}; negative numbers
            count from the last. They replace `attn` there, and dense_layers does not concern them.
        graph: "auto", the default: after the prefill, calls of at most `max_sparse_q` tokens of a model on CUDA replay
            one CUDA graph of its layers, which is captured by itself, with no argument to generate(): the same tokens,
            without the time that Python takes. What cannot be captured runs as ever, and report().graph says why.
            "always": such a call raises ValueError, which names the reason. "never": every call runs as ever.

    Returns:
        A Handle: update(), report(), reads(), detach(); also a context manager.

    Raises:
        ValueError: the model cannot be served (strict), is attached already, or a part does not fit it: encoders
            that were fitted to another model, say; a `graph` or `max_sparse_q` that is none.
        TypeError: `layers` that does not map ints to compositions.
    """
    options = Options(strict, max_sparse_q, trace, simulate, graph)
    if is_attached(model):
        raise ValueError("model is attached already: call detach() on its handle, or hashattn.detach(model), first")
    reasons = support.why_not(model)
    if reasons and strict:
        raise ValueError(f"{type(model).__name__} cannot be attached: {'; '.join(reasons)}")
    if reasons:
        return Handle(attn, model, tuple(reasons), None)
    assert isinstance(model, PreTrainedModel)
    modules = support.attention_modules(model)
    devices, depth = devices_of(modules), support.depth_of(model, modules)
    single = layer_compositions(layers, modules, depth)
    for composition in (attn, *single.values()):
        check_facts(composition, model)
    served = {i: serve(single.get(i, attn), i in single, module, i, depth) for i, module in modules.items()}
    for one in served.values():
        one.composition.to(devices[0])
    hooks = Hooks(Forward(served, options, devices[0] if len(devices) == 1 else None), modules)
    hooks.install(model)
    return Handle(attn, model, (), hooks)


def serve(composition: HashAttention, own: bool, module: nn.Module, number: int, depth: int) -> ServedLayer:
    """Bind a composition to a layer; see :meth:`ServedLayer.bind`.

    Raises:
        ValueError: a part does not fit the layer's heads, or dense_layers names a layer that the model lacks.
        RuntimeError: an encoder that cannot encode before it is fitted.
    """
    by_model = support.layer_dense_by_design(module, number)
    served = ServedLayer.bind(composition, own, number, depth, by_model)
    attn, device = served.attn, devices_of({number: module})[0].type
    if attn is None or served.why_dense is not None:
        return served
    if attn.encoder is not None:
        attn.encoder.check_model(*heads(module))
        attn.encoder.check_fitted()
    if device != "meta":  # offloaded: not yet known
        check_engine(attn, device, dtype_of(module), heads(module))
    return served


def _revised_layer(served: ServedLayer, number: int, changes: dict[str, Any]) -> HashAttention:
    try:
        return revised(served.composition, changes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {number}: {error}") from None
