"""What an attention module's layer is: its config, its heads, where it is and in which type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# what the models of transformers call them; a module's own come before its config's
Q_HEADS = ("num_heads", "num_attention_heads", "num_q_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "num_k_heads", "n_kv_heads")
HEAD_DIM = ("qk_head_dim", "head_dim", "head_size", "attention_head_size")
KEYS, VALUES = ("k_proj", "key", "Wk"), ("v_proj", "value", "Wv")


def layer_config(module: nn.Module) -> Any:
    """The config of a module's layer: its own where the layers of a model differ."""
    config: Any = module.config
    if getattr(config, "is_heterogeneous", False):
        return config.per_layer_config[module.layer_idx]
    return config


def heads(module: nn.Module) -> tuple[int, int, int]:
    """(q_heads, kv_heads, head_dim) of an attention module.

    Raises:
        ValueError: neither the module nor its config says them, or keys and values differ in size.
    """
    config = layer_config(module)
    q_heads = _number(module, Q_HEADS) or _number(config, ("num_attention_heads",))
    if q_heads is None:
        raise ValueError("neither the module nor its config says how many heads it has")
    width, own = _number(config, ("hidden_size",)), _number(module, HEAD_DIM) or _number(config, ("head_dim",))
    head_dim = own if own is not None else width // q_heads if width is not None else None
    if head_dim is None:
        raise ValueError("neither the module nor its config says the size of its heads")
    keys, values = _outputs(module, KEYS), _outputs(module, VALUES)
    value_dim = _number(module, ("v_head_dim",)) or (head_dim if keys is None or keys == values else None)
    if value_dim not in (None, head_dim) or (value_dim is None and values is not None):
        raise ValueError(f"its keys have {keys or head_dim} dimensions, its values {values or value_dim}")
    if keys is not None and keys % head_dim == 0:
        return q_heads, keys // head_dim, head_dim
    groups = _number(module, ("num_key_value_groups",))
    kv_heads = _number(module, KV_HEADS) or (q_heads // groups if groups else None)
    return q_heads, kv_heads or _number(config, KV_HEADS) or q_heads, head_dim


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a positive number."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and value > 0:
            return int(value)
    return None


def _outputs(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """How many features a projection of the module has; None without one that says so."""
    for name in names:
        features = getattr(getattr(module, name, None), "out_features", None)
        if isinstance(features, int):
            return features
    return None


def devices_of(modules: dict[int, nn.Module]) -> list[torch.device]:
    """Where the attention weights are, without meta (weights offloaded by layer) if they are elsewhere too.

    Packed and int8 weights are buffers. Modules without either say nothing: the CPU then.
    """
    tensors = (t for m in modules.values() for t in (list(m.parameters()) or m.buffers()))
    devices = list(dict.fromkeys(t.device for t in tensors))
    return [d for d in devices if d.type != "meta"] or devices or [torch.device("cpu")]


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: the type of its weights, or what its config says where they are packed."""
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and all(t.is_floating_point() and t.element_size() > 1 for t in tensors):
        return tensors[0].dtype
    said = getattr(module.config, "dtype", None)
    return said if isinstance(said, torch.dtype) else torch.get_default_dtype()
