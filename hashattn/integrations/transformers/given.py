"""What a model gives the attention function: whether it can be searched, and how the model itself would attend."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hashattn.cache.kv_cache import KVCache
from hashattn.integrations.transformers.source import eager_of

# change the softmax, or whose weights are wanted; SDPA honours the first where its signature names it
MATTERS = ("position_bias", "softcap", "s_aux", "sinks", "head_mask", "layer_head_mask", "indices", "block_indices")
BY_SDPA = frozenset(inspect.signature(sdpa_attention_forward).parameters) & frozenset(MATTERS)
# tensors that positions, masks and packed rows were made of, which matter no more by then
SPENT = ("position_ids", "cache_position", "input_ids", "inputs_embeds", "labels", "token_type_ids", "attention_mask")


def why_not_given(kv: KVCache | None, key: Tensor, value: Tensor, again: bool, given: Mapping[str, Any]) -> str | None:
    """Why a call of the attention function cannot be searched; None if it can be.

    Args:
        kv: the layer's cache, filled; None where the layer keeps the model's own.
        key, value: [B, Hkv, N, D].
        again: whether the layer called the function before in this pass.
        given: its keywords.
    """
    if kv is None:
        return _unknown(given)
    if again:
        return "its attention calls the attention function more than once a layer"
    if not any(_same(key, k) and _same(value, v) for k, v in ((kv.keys, kv.values), kv.allocated)):
        return (
            f"the keys {[*key.shape]} and values {[*value.shape]} that attention is given are not those that the cache "
            f"holds, {[*kv.keys.shape]}"
        )
    if given.get("is_causal") is False:
        return "attention is not causal (is_causal=False)"
    return _unknown(given)


def why_not_dropped(given: Mapping[str, Any]) -> str | None:
    """Why a call with these keywords cannot search: it would drop attention weights at random."""
    rate = given.get("dropout") or 0.0
    return f"attention drops weights (dropout={rate} in training mode): call model.eval()" if rate else None


def attend_as_the_model(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None,
    given: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Full attention with what SDPA knows, and else by the model's own eager function.

    Raises:
        ValueError: keywords that matter, in a module without an eager function of its own.
    """
    matters = [name for name in _matters(given) if name not in BY_SDPA]
    if not matters and not given.get("output_attentions"):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **given)
    eager = eager_of(type(module))
    if eager is None:
        raise ValueError(f"{type(module).__name__} gives attention {', '.join(matters)}, which is not known here")
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    out: tuple[Tensor, Tensor | None] = eager(module, query, key, value, mask, scaling=scaling, **given)
    return out


def _unknown(given: Mapping[str, Any]) -> str | None:
    if given.get("output_attentions"):
        return "output_attentions=True asks for the weights of full attention"
    names = _matters(given)
    return f"attention is given {', '.join(names)}, which a search does not take part in" if names else None


def _matters(given: Mapping[str, Any]) -> list[str]:
    """Keywords that change the result, and tensors that nobody here knows."""
    return [
        name
        for name, value in given.items()
        if value is not None and (name in MATTERS or (isinstance(value, Tensor) and name not in SPENT))
    ]


def _same(given: Tensor, held: Tensor) -> bool:
    """Whether both are one tensor."""
    if given is held:
        return True
    return (given.shape, given.stride(), given.device, given.dtype) == (
        held.shape, held.stride(), held.device, held.dtype
    ) and given.data_ptr() == held.data_ptr()  # fmt: skip
