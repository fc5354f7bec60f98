"""Which models, layers and caches can be served, and why not."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from hashattn import fused
from hashattn.attention import HashAttention
from hashattn.engines import resolve
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.static_layer import HashedStaticLayer


def text_config(model: PreTrainedModel) -> Any:
    """The config of the decoder's text part."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder's attention modules by layer number."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and hasattr(module, "q_proj") and hasattr(module, "k_proj"):
            found[number] = module
    return dict(sorted(found.items()))


def trunk(model: nn.Module, modules: dict[int, nn.Module]) -> nn.Module:
    """The module whose forward runs the layers: what holds the list that the attention modules are in."""
    paths = [name.split(".") for name, module in model.named_modules() if module is next(iter(modules.values()))]
    owner: nn.Module = model
    for name in paths[0]:
        inner = owner.get_submodule(name)
        if isinstance(inner, nn.ModuleList | nn.ModuleDict):
            return owner
        owner = inner
    return model


def why_not(model: nn.Module) -> list[str]:
    """What keeps this model from being served: no entries if it can be."""
    if not isinstance(model, PreTrainedModel):
        return [f"model must be a transformers PreTrainedModel, got {type(model).__name__}"]
    config, modules, reasons = text_config(model), attention_modules(model), []
    if model.config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder model, whose cross-attention is not decoding over a growing cache")
    if not model._supports_attention_backend:
        reasons.append("it does not use the attention interface of transformers, so attention cannot be replaced")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        reasons.append(f"its attention logits are soft-capped (attn_logit_softcapping={config.attn_logit_softcapping})")
    if any(isinstance(getattr(m, "sinks", None), nn.Parameter) for m in modules.values()):
        reasons.append("its attention has learned sinks, which take part in every softmax")
    if getattr(config, "kv_lora_rank", None) is not None:
        reasons.append("it uses multi-head latent attention, whose cache holds no keys")
    if getattr(config, "num_kv_shared_layers", None):
        reasons.append(f"{config.num_kv_shared_layers} of its layers share the keys of other layers")
    if getattr(config, "index_topk", None) is not None:
        reasons.append("it has a sparse attention of its own (index_topk)")
    inputs = {name for m in modules.values() for name in inspect.signature(m.forward).parameters}
    if modules and not inputs & {"past_key_values", "cache"}:
        reasons.append("its attention takes its cache under a name that is not known here")
    if modules and devices_of(modules)[0].type == "meta":
        reasons.append("its weights are on the meta device")
    if not modules:
        reasons.append("no attention modules with q_proj, k_proj and a layer_idx were found in it")
    elif not reasons and all(layer_dense_by_design(m, i) for i, m in modules.items()):
        reasons.append("it has no layer of full causal attention: " + str(layer_dense_by_design(*_first(modules))))
    return reasons


def _first(modules: dict[int, nn.Module]) -> tuple[nn.Module, int]:
    number = next(iter(modules))
    return modules[number], number


def layer_dense_by_design(module: nn.Module, number: int) -> str | None:
    """Why the model itself keeps this layer from a search over all keys: a sliding window, say. None if it does not."""
    config: Any = module.config
    types = getattr(config, "layer_types", None)
    if types is not None:
        if types[number] != "full_attention":
            return str(types[number]).replace("_", " ")
    elif getattr(config, "sliding_window", None) is not None:
        return "sliding attention"
    return None if getattr(module, "is_causal", True) else "bidirectional attention"


def heads(module: nn.Module) -> tuple[int, int, int]:
    """(q_heads, kv_heads, head_dim) of an attention module."""
    config: Any = module.config
    return config.num_attention_heads, config.num_key_value_heads, int(module.head_dim)  # type: ignore[arg-type]


def check_engine(attn: HashAttention, module: nn.Module) -> None:
    """Raise ValueError if the engine that the composition names cannot serve this module where it is."""
    q_heads, kv_heads, head_dim = heads(module)
    weight = next(module.parameters())
    if weight.is_meta:  # offloaded: not yet known
        return
    unfused = fused.why_not(
        attn, device=weight.device.type, dtype=weight.dtype, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim
    )
    resolve(attn, weight.device.type, 0, None, unfused)


def devices_of(modules: dict[int, nn.Module]) -> list[torch.device]:
    """Where the attention weights are, without meta (weights offloaded by layer) if they are elsewhere too."""
    devices = list(dict.fromkeys(p.device for m in modules.values() for p in m.parameters()))
    return [d for d in devices if d.type != "meta"] or devices


def why_not_input(hidden: Tensor) -> str | None:
    """What keeps a call with these hidden states from being served; None if it can be."""
    if hidden.is_meta:
        return "the model is on the meta device, where there are no keys to search"
    if torch.is_autocast_enabled(hidden.device.type):
        return "autocast is on, which gives keys and values different types; load the model in the type you want"
    return None


def why_not_cache(cache: object, number: int) -> str | None:
    """What keeps this layer of a cache from being served; None if it can be."""
    use = "dynamic and static caches are served"
    if not isinstance(cache, DynamicCache | StaticCache):
        return f"the cache is a {type(cache).__name__}; {use}"
    if cache.offloading:
        return f"the cache is offloaded; {use} without offloading"
    if number >= len(cache.layers):
        replicated = getattr(cache, "layer_class_to_replicate", None)
        return None if replicated is DynamicLayer else f"the cache has no layer {number}"
    layer = cache.layers[number]
    if type(layer) not in (DynamicLayer, StaticLayer, HashedLayer, HashedStaticLayer):
        return f"layer {number} of the {type(cache).__name__} is a {type(layer).__name__}; {use}"
    return None


def check_append(layer: object, hidden: Tensor, one_device: bool) -> None:
    """Raise unless a layer of a cache can take what attention makes of hidden states [B, T, hidden size].

    Args:
        one_device: whether the whole model is on one device.

    Raises:
        TypeError: the model has another dtype or device than what the layer holds.
        ValueError: another number of rows, or a static layer without the room.
    """
    if isinstance(layer, StaticLayer | HashedStaticLayer):
        filled, room = int(layer.get_seq_length()), layer.max_cache_len
        if filled + hidden.shape[1] > room:
            raise ValueError(
                f"the static cache holds {filled} of max_cache_len={room} tokens, but the input has "
                f"{hidden.shape[1]}: make it longer, or use a dynamic cache"
            )
    kv = layer.kv if isinstance(layer, HashedLayer) else None
    if kv is None or len(kv) == 0:
        return
    assert isinstance(layer, HashedLayer)
    if layer.dtype != hidden.dtype or (one_device and layer.device != hidden.device):
        raise TypeError(
            f"the cache holds {layer.dtype} on {layer.device}, but the model now computes in {hidden.dtype} on "
            f"{hidden.device}: start with a new cache after moving a model"
        )
    if kv.batch != hidden.shape[0]:
        raise ValueError(f"the cache holds {kv.batch} rows, but the input has {hidden.shape[0]}")
