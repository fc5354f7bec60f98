"""AttentionArguments: what a model gives the attention function, whether it can be searched, and how else to attend."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hashattn.attend.dense import dense
from hashattn.cache.kv_cache import KVCache
from hashattn.integrations.transformers.attention_module import eager_of

# change the softmax, or whose weights are wanted; SDPA honours the first where its signature names it
CHANGING = ("position_bias", "softcap", "s_aux", "sinks", "head_mask", "layer_head_mask", "indices", "block_indices")
BY_SDPA = frozenset(inspect.signature(sdpa_attention_forward).parameters) & frozenset(CHANGING)
# tensors that positions, masks and packed rows were made of, which matter no more by then
HARMLESS = (
    "position_ids",
    "cache_position",
    "input_ids",
    "inputs_embeds",
    "labels",
    "token_type_ids",
    "attention_mask",
)


FEW = 16  # queries, as many as a check has at most


@dataclass(frozen=True, eq=False)
class AttentionArguments:
    """One call of the attention function.

    Attributes:
        query: [B, Hq, T, D].
        key, value: [B, Hkv, N, D].
        mask: of the layer.
        keywords: the others, scaling included.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    keywords: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Queries of the call."""
        return self.query.shape[2]

    @property
    def scaling(self) -> float | None:
        """Of the logits; None for 1 / sqrt(D)."""
        return self.keywords.get("scaling")

    def filled(self, kv: KVCache | None) -> AttentionArguments:
        """Without the free columns that a static cache hands out as well."""
        if kv is None or self.key.shape[2] <= len(kv):
            return self
        mask = self.mask if self.mask is None else self.mask[..., : len(kv)]
        return replace(self, key=kv.keys, value=kv.values, mask=mask)

    def why_not(self, kv: KVCache | None, repeated: bool) -> str | None:
        """Why the call cannot be searched; None if it can be.

        Args:
            kv: the layer's cache, filled; None where the layer keeps the model's own.
            repeated: whether the layer called the function before in this pass.
        """
        if kv is None:
            return self._why_not_keywords()
        if repeated:
            return "its attention calls the attention function more than once a layer"
        held = ((kv.keys, kv.values), kv.allocated)
        if not any(_same(self.key, k) and _same(self.value, v) for k, v in held):
            return (
                f"the keys {[*self.key.shape]} and values {[*self.value.shape]} that attention is given are not those "
                f"that the cache holds, {[*kv.keys.shape]}"
            )
        if self.keywords.get("is_causal") is False:
            return "attention is not causal (is_causal=False)"
        return self._why_not_keywords()

    def check_recorded(self, kv: KVCache | None) -> None:
        """Raise ValueError where a graph would leave out what the model gives its attention, or misread it."""
        reason = self._why_not_keywords() or self.why_not_dropout
        alike = {(x.dtype, x.device) for x in (self.query, self.key, self.value)}
        if kv is None or alike != {kv.kind} or self.key.shape != (kv.batch, kv.kv_heads, self.tokens, kv.head_dim):
            reason = f"keys {self.key.dtype} {[*self.key.shape]} on {self.key.device} do not fit {kv}"
        if self.keywords.get("is_causal") is False:
            reason = "attention is not causal (is_causal=False)"
        elif self.mask is not None and self.mask.dtype != torch.bool:
            reason = "attention is given a mask that adds to its logits"
        if reason is not None:
            raise ValueError(reason)

    @property
    def why_not_dropout(self) -> str | None:
        """Why the call cannot search: it would drop attention weights at random."""
        rate = self.keywords.get("dropout") or 0.0
        return f"attention drops weights (dropout={rate} in training mode): call model.eval()" if rate else None

    @property
    def few(self) -> bool:
        """Whether these are a few queries behind many keys on a CPU, whose SDPA is slow then: it repeats keys."""
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (self.query, self.key, self.value))
        if wanted or self.why_not_dropout is not None or self.query.device.type != "cpu" or self.mask is None:
            return False
        return 1 < self.tokens <= FEW and self.mask.shape == (len(self.query), 1, self.tokens, self.key.shape[2])

    def attend_few(self) -> Tensor:
        """Full attention that reads keys once for all queries of a group of heads, [B, T, Hq, D]."""
        scale = self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        return dense(self.query, self.key, self.value, self.mask, scale).out.transpose(1, 2).contiguous()

    def attend_by_sdpa(self) -> tuple[Tensor, None]:
        """Full attention, [B, T, Hq, D]."""
        return sdpa_attention_forward(self.module, self.query, self.key, self.value, self.mask, **self.keywords)

    def attend_as_the_model(self) -> tuple[Tensor, Tensor | None]:
        """Full attention with what SDPA knows, and else by the model's own eager function.

        Raises:
            ValueError: keywords that matter, in a module without an eager function of its own.
        """
        matters = [name for name in self._matters() if name not in BY_SDPA]
        if not matters and not self.keywords.get("output_attentions"):
            return self.attend_by_sdpa()
        kind = type(self.module)
        eager = eager_of(kind)
        if eager is None:
            raise ValueError(f"{kind.__name__} gives attention {', '.join(matters)}, which is not known here")
        mask, query, keys = self.mask, self.query, self.key.shape[2]
        if mask is None and self.tokens > 1:
            mask = torch.ones(self.tokens, keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(keys - self.tokens)[None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        out: tuple[Tensor, Tensor | None] = eager(
            self.module, query, self.key, self.value, mask, **{"scaling": None, **self.keywords}
        )
        return out

    def _why_not_keywords(self) -> str | None:
        if self.keywords.get("output_attentions"):
            return "output_attentions=True asks for the weights of full attention"
        names = self._matters()
        return f"attention is given {', '.join(names)}, which a search does not take part in" if names else None

    def _matters(self) -> list[str]:
        """Keywords that change the result, and tensors that nobody here knows."""
        return [
            name
            for name, value in self.keywords.items()
            if value is not None and (name in CHANGING or (isinstance(value, Tensor) and name not in HARMLESS))
        ]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are one tensor."""
    return one is other or (_place(one) == _place(other) and one.data_ptr() == other.data_ptr())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.device, tensor.dtype
