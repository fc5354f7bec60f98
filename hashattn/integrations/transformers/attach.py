"""attach(): put a composition to work in a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from hashattn.attention import HashAttention
from hashattn.integrations.attached.report import LayerRecord
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.attached import Attached, is_attached
from hashattn.integrations.transformers.forward import Forward
from hashattn.integrations.transformers.handle import Handle
from hashattn.integrations.transformers.heads import devices_of
from hashattn.integrations.transformers.layers import check_facts, overrides, serve


def attach(
    attn: HashAttention, model: nn.Module, *, strict: bool = True, max_sparse_q: int = 1, trace: bool = False,
    simulate: bool = False, layers: Mapping[int, HashAttention] | None = None,
) -> Handle:  # fmt: skip
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

    Returns:
        A Handle: update(), report(), reads(), detach(); also a context manager.

    Raises:
        ValueError: the model cannot be served (strict), is attached already, or a part does not fit it: encoders
            that were fitted to another model, say.
        TypeError: `layers` that does not map ints to compositions.
    """
    if max_sparse_q < 1:
        raise ValueError(f"max_sparse_q must be at least 1, got {max_sparse_q}")
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
    single = overrides(layers, modules, depth)
    for composition in (attn, *single.values()):
        check_facts(composition, model)
    served = {i: serve(single.get(i, attn), i in single, module, i, depth) for i, module in modules.items()}
    device = devices[0] if len(devices) == 1 else None
    forward = Forward(served, {i: LayerRecord() for i in modules}, strict, max_sparse_q, trace, device, simulate)
    for one in served.values():
        one.composition.to(devices[0])
    attached = Attached(forward, modules)
    attached.install(model)
    return Handle(attn, model, (), attached)
