"""Which models and layers can be served, and why not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hashattn.integrations.transformers.attention_module import (
    calls_interface,
    devices_of,
    heads,
    layer_config,
    source_of,
)

CACHE_NAMES = ("past_key_values", "cache", "layer_past", "past_key_value")  # "cache" since transformers 5.24
FULL = ("full_attention", "hybrid")  # a hybrid layer has full attention beside a recurrent part
SOFT_CAPPED = "its attention logits are soft-capped"
HONOURED_NOT = {"softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"}


def text_config(model: PreTrainedModel) -> Any:
    """The config of the decoder's text part."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder's attention modules by layer number: those that call the attention interface and update a cache.

    Of several under one number it is the first: cross-attention comes after. Other stacks are told by clashes().
    """
    found: dict[int, nn.Module] = {}
    for _, number, module in _numbered(model):
        found.setdefault(number, module)
    return dict(sorted(found.items()))


def layer_stack(model: nn.Module, modules: dict[int, nn.Module]) -> nn.Module:
    """The module whose forward runs the layers: what holds the list that the attention modules are in."""
    paths = [name.split(".") for name, module in model.named_modules() if module is next(iter(modules.values()))]
    owner: nn.Module = model
    for name in paths[0]:
        inner = owner.get_submodule(name)
        if isinstance(inner, nn.ModuleList | nn.ModuleDict):
            return owner
        owner = inner
    return model


def _numbered(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    for name, module in model.named_modules():
        number = getattr(module, "layer_idx", None)
        if type(number) is int and calls_interface(type(module)):
            source = source_of(type(module))
            if source is None or source.cached:
                yield name, number, module


def clashes(model: nn.Module) -> list[str]:
    """Attention modules under one number that are not parts of one layer, by name; none where numbers are unique."""
    first: dict[int, str] = {}
    for name, number, _ in _numbered(model):
        other = first.setdefault(number, name)
        if _layer_name(name) != _layer_name(other):
            return [other, name]
    return []


def _layer_name(name: str) -> str:
    """A module's name up to the number of its layer: "model.layers.3" of "model.layers.3.self_attn"."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else name


def depth_of(model: nn.Module, modules: dict[int, nn.Module]) -> int:
    """How many layers the decoder has, those without attention included."""
    config: Any = text_config(model)  # type: ignore[arg-type]
    return max([int(getattr(config, "num_hidden_layers", 0)), *(number + 1 for number in modules)])


def why_not(model: nn.Module) -> list[str]:
    """What keeps this model from being served: no entries if it can be."""
    if not isinstance(model, PreTrainedModel):
        hint = "; attach to its get_base_model(), which runs with its adapters" if is_peft(model) else ""
        return [f"model must be a transformers PreTrainedModel, got {type(model).__name__}{hint}"]
    config, modules, reasons = text_config(model), attention_modules(model), []
    if model.config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder model, whose cross-attention is not decoding over a growing cache")
    if not modules:
        reasons.append(
            "it has no attention that calls the attention interface of transformers and has a cache layer of its own"
        )
        return reasons
    if getattr(config, "num_kv_shared_layers", None) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        reasons.append("some of its layers share the keys of other layers")
    if names := clashes(model):
        reasons.append(f"it has several stacks of attention whose layers share their numbers: {' and '.join(names)}")
    for number, module in modules.items():
        reasons += [r for r in why_not_module(module, number) if r not in reasons]
    if getattr(config, "attn_logit_softcapping", None) is not None and SOFT_CAPPED not in reasons:
        reasons.append(SOFT_CAPPED)
    if modules and devices_of(modules)[0].type == "meta":
        reasons.append("its weights are on the meta device")
    if not reasons and all(layer_dense_by_design(m, i) for i, m in modules.items()):
        reasons.append("it has no layer of full causal attention: " + str(layer_dense_by_design(*_first(modules))))
    return reasons


def is_peft(model: nn.Module) -> bool:
    """Whether adapters of peft are wrapped around a model."""
    return callable(getattr(model, "get_base_model", None))


def why_not_module(module: nn.Module, number: int) -> list[str]:
    """What keeps an attention module from being served, as its source and its attributes say.

    What the source does not show is looked at in each call; see AttentionArguments.
    """
    source, reasons = source_of(type(module)), []
    keywords = dict(source.keywords) if source is not None else {}
    keywords = {name: path for name, path in keywords.items() if not path or attribute(module, path) is not None}
    if "softcap" in keywords:
        reasons.append(SOFT_CAPPED)
    if {"s_aux", "sinks"} & set(keywords) or isinstance(getattr(module, "sinks", None), nn.Parameter):
        reasons.append("its attention has learned sinks, which take part in every softmax")
    if "position_bias" in keywords:
        reasons.append("its attention adds a position bias to the logits")
    if {"indices", "block_indices"} & set(keywords):
        reasons.append("it has a sparse attention of its own, whose choice the attention function is given")
    if unknown := set(keywords) - HONOURED_NOT:
        reasons.append(f"its attention function is given {', '.join(sorted(unknown))}, which is not known here")
    if source is not None and source.calls > 1:
        reasons.append(
            f"its attention calls the attention function {source.calls} times a layer, with parts of the values"
        )
    elif source is not None and not source.own_keys:
        latent = getattr(module, "kv_lora_rank", None) is not None
        reasons.append(
            "it uses multi-head latent attention, whose cache holds no keys"
            if latent
            else "its attention attends to other keys and values than its cache holds: to what it makes of them"
        )
    if source is not None and source.own_mask:
        reasons.append("its attention makes a mask of its own")
    if source is not None and not source.own_number:
        reasons.append("its layers keep several caches each, or one under another layer's number")
    if source is not None and not source.passes_on:
        reasons.append("its attention does not pass on to the attention function what it is given")
    if not set(inspect.signature(type(module).forward).parameters) & set(CACHE_NAMES):
        reasons.append("its attention takes its cache under a name that is not known here")
    if reasons or layer_dense_by_design(module, number):
        return reasons
    try:
        q_heads, kv_heads, _ = heads(module)
    except ValueError as error:
        return [f"the heads of its layer {number} cannot be served: {error}"]
    return (
        [] if q_heads % kv_heads == 0 else [f"its {q_heads} query heads are not a multiple of its {kv_heads} KV heads"]
    )


def attribute(module: nn.Module, path: str) -> Any:
    """What a dotted path of attributes leads to; None where there is nothing."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _first(modules: dict[int, nn.Module]) -> tuple[nn.Module, int]:
    number = next(iter(modules))
    return modules[number], number


def layer_dense_by_design(module: nn.Module, number: int) -> str | None:
    """Why the model itself keeps this layer from a search over all keys: a sliding window, say. None if it does not.

    A window as long as the positions that the model has is none.
    """
    config = layer_config(module)
    types = getattr(config, "layer_types", None)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if types is not None:
        kind = str(types[number])
    elif getattr(config, "use_sliding_window", True) and window is not None:
        kind = "sliding_attention"
    else:
        kind = "full_attention" if chunk is None else "chunked_attention"
    span = {"sliding_attention": window, "hybrid_sliding": window, "chunked_attention": chunk}.get(kind)
    if kind not in FULL and not (isinstance(span, int) and span >= positions(config)):
        return kind.replace("_", " ")
    return None if getattr(module, "is_causal", True) else "bidirectional attention"


def positions(config: Any) -> float:
    """How many positions a model has; infinity where its config does not say."""
    most = getattr(config, "max_position_embeddings", None)
    return most if isinstance(most, int) else float("inf")


def why_not_input(hidden: Tensor) -> str | None:
    """What keeps a call with these hidden states from being served; None if it can be."""
    if hidden.is_meta:
        return "the model is on the meta device, where there are no keys to search"
    if torch.is_autocast_enabled(hidden.device.type):
        return "autocast is on, which gives keys and values different types; load the model in the type you want"
    return None
