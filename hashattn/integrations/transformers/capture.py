"""capture(): the queries, keys and values of a model's attention layers, to fit encoders with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hashattn.integrations.transformers import support

NAME = "hashattn_capture"


@dataclass(frozen=True)
class Captured:
    """One layer's attention inputs, post-RoPE: q [B, Hq, T, D] of the last T positions, k and v [B, Hkv, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


@torch.no_grad()
def capture(
    model: nn.Module, input_ids: Tensor, *, layers: Iterable[int] | None = None, queries: int | None = None
) -> dict[int, Captured]:
    """Run a model over a text once, densely, and keep what its attention layers were given.

    Args:
        model: a causal language model that can be attached.
        input_ids: int64 [B, N], without padding.
        layers: which layers to keep; all of full attention by default.
        queries: keep those of the last so many positions only; all by default.

    Returns:
        layer number -> Captured, on the model's device.

    Raises:
        ValueError: the model cannot be served, a layer it does not have, or an attached model.
    """
    reasons = support.why_not(model)
    if reasons:
        raise ValueError(f"{type(model).__name__} cannot be captured: {'; '.join(reasons)}")
    modules = support.attention_modules(model)
    full = [i for i, m in modules.items() if support.layer_dense_by_design(m, i) is None]
    wanted = set(full if layers is None else layers)
    if not wanted <= set(full):
        raise ValueError(f"layers must be among {full}, got {sorted(wanted - set(full))}")
    kept: dict[int, Captured] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        number = int(module.layer_idx)  # type: ignore[arg-type]
        if number in wanted:
            last = query[:, :, -queries:] if queries is not None else query
            kept[number] = Captured(last.clone(), key.clone(), value.clone())
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    configs: dict[int, Any] = {id(m.config): m.config for m in modules.values()}
    before = [(c, c._attn_implementation_internal) for c in configs.values()]
    if any(name == "hashattn" for _, name in before):
        raise ValueError("model is attached: detach it first")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        AttentionInterface.register(NAME, sdpa_attention_forward)  # keeps nothing alive
    return dict(sorted(kept.items()))
