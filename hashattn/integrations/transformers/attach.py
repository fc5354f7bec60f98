"""attach(): put a composition to work in a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hashattn.attention import HashAttention
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.forward import HASHATTN_CALL, Forward, hashed_attention
from hashattn.integrations.transformers.handle import Handle
from hashattn.integrations.transformers.layers import check_facts, overrides, serve
from hashattn.integrations.transformers.report import LayerRecord

NAME = "hashattn"


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
    reasons = support.why_not(model)
    if reasons and strict:
        raise ValueError(f"{type(model).__name__} cannot be attached: {'; '.join(reasons)}")
    modules = {} if reasons else support.attention_modules(model)
    devices = support.devices_of(modules)
    device = devices[0] if len(devices) == 1 else None
    configs: dict[int, Any] = {id(m.config): m.config for m in modules.values()}
    if any(c._attn_implementation == NAME for c in configs.values()):
        raise ValueError("model is attached already: call detach() on its handle first")
    depth = len(modules)
    single = {} if reasons else overrides(layers, depth)
    for composition in () if reasons else (attn, *single.values()):
        check_facts(composition, model)
    served = {i: serve(single.get(i, attn), i in single, module, i, depth) for i, module in modules.items()}
    forward = Forward(served, {i: LayerRecord() for i in modules}, strict, max_sparse_q, trace, device, simulate)
    handle = Handle(attn, model, tuple(reasons), forward, modules)
    if reasons:
        return handle
    for one in served.values():
        one.composition.to(devices[0])
    AttentionInterface.register(NAME, hashed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it masks are None and left-padded rows go wrong
    for config in configs.values():
        handle._configs.append((config, config._attn_implementation_internal))
        config._attn_implementation_internal = NAME
    handle._hooks += around(forward, support.trunk(model, modules))
    for number, module in modules.items():
        hook = pre_hook(forward, number, module)
        handle._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return handle


Argument = Callable[[tuple[Any, ...], dict[str, Any], str], Any]


def arguments(module: nn.Module) -> Argument:
    """What reads an argument of a module's call by its name; None where it is not given."""
    places = {name: i for i, name in enumerate(inspect.signature(module.forward).parameters)}

    def argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        place = places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)

    return argument


def cache_in(argument: Argument, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache among a call's arguments."""
    cache = argument(args, kwargs, "past_key_values")
    return argument(args, kwargs, "cache") if cache is None else cache  # since transformers 5.24; before, a paged one


def around(forward: Forward, trunk: nn.Module) -> list[RemovableHandle]:
    """Hooks that begin and end a pass with each call of the module that runs the layers, errors included."""
    argument = arguments(trunk)

    def steps(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool]:
        cache, tokens = cache_in(argument, args, kwargs), argument(args, kwargs, "input_ids")
        if tokens is None:
            tokens = argument(args, kwargs, "inputs_embeds")
        return cache, tokens, tokens is not None and forward.steps(cache, tokens.shape[1])

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, tokens, stepping = steps(args, kwargs)
        if tokens is not None and not stepping:
            forward.open(module, cache, argument(args, kwargs, "attention_mask"), *tokens.shape[:2])

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _, tokens, stepping = steps(args, kwargs)
        if tokens is not None and not stepping:
            forward.close()

    return [
        trunk.register_forward_pre_hook(begin, with_kwargs=True),
        trunk.register_forward_hook(end, with_kwargs=True, always_call=True),
    ]


def pre_hook(forward: Forward, number: int, module: nn.Module) -> Any:
    """The forward pre-hook of an attention module: hands the layer's cache on to the attention function."""
    argument = arguments(module)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache, hidden = cache_in(argument, args, kwargs), argument(args, kwargs, "hidden_states")
        stepping = forward.stepping(number, cache, hidden.shape[1])
        if stepping is False:
            mask = argument(args, kwargs, "attention_mask")
            kwargs[HASHATTN_CALL] = forward.prepare(number, cache, hidden, mask)
        elif stepping is not True:
            kwargs[HASHATTN_CALL] = stepping
        return args, kwargs

    return hook
