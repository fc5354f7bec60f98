"""A Llama-shaped model with random weights, and greedy decoding that a CUDA graph can capture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.core.extras import require
from hashattn.encoders.base import Encoder

NAME = "hashattn_bench"
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Of a layer's number and the newest token's q [B, Hq, 1, D], k and v [B, Hkv, 1, D]: the output, like q."""


@dataclass
class Slot:
    """Holds what a step attends with. Layers are compiled for a slot, and not anew for what is in it."""

    attend: Attend | None = None


@dataclass(frozen=True)
class Llama:
    """Sizes of a model. The defaults are those of Llama-3-8B."""

    layers: int = 32
    hidden: int = 4096
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336
    vocabulary: int = 128256
    dtype: torch.dtype = torch.bfloat16

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        heads = 2 * self.q_heads + 2 * self.kv_heads
        layer = self.hidden * (heads * self.head_dim + 3 * self.intermediate + 2)
        return (self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden) * self.dtype.itemsize

    def token_bytes(self, encoder: Encoder) -> int:
        """Memory of a token's keys, values and codes, and of the candidates that a step may list of it."""
        row = 2 * self.kv_heads * self.head_dim * self.dtype.itemsize
        codes = encoder.code_heads(self.kv_heads) * 8 * -(-encoder.bits // 64)
        return self.layers * (row + codes) + 4 * self.q_heads


def make_model(size: Llama, device: torch.device) -> nn.Module:
    """The model, made on the device with transformers' own random weights. Its attention is what a step is given."""
    transformers = require("transformers", "hf", "--e2e")
    transformers.AttentionInterface.register(NAME, attention)
    return from_config(size, device, attn_implementation=NAME)


def from_config(size: Llama, device: torch.device, *, attn_implementation: str, **config: Any) -> nn.Module:
    """A model of this size, made on the device with random weights. config: what else transformers' config takes."""
    transformers = require("transformers", "hf", "a model with random weights")
    own = transformers.LlamaConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.q_heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        max_position_embeddings=1 << 20,
        rope_theta=500_000.0,
        **config,
    )
    with device:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            own, dtype=size.dtype, attn_implementation=attn_implementation
        )
    return model.eval()


@torch.compiler.disable  # kernels that are launched as they are
def attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, slot: Slot, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers: hands on to what is in the slot of the call."""
    assert slot.attend is not None
    return slot.attend(module.layer_idx, q, k, v).transpose(1, 2), None  # type: ignore[arg-type]


def compile_layers(model: nn.Module) -> None:
    """Let torch.compile fuse what lies between the attention calls and the large products, in place."""
    inner: Any = model.model
    for part in (*inner.layers, inner.norm):
        part.compile(dynamic=False)


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding, one token at a time and in place.

    Attributes:
        model: from make_model.
        token: int64 [B, 1], the newest token.
        position: int64 [1, 1], its position.
        slot: for what a step attends with.
    """

    model: nn.Module
    token: Tensor
    position: Tensor
    slot: Slot = field(default_factory=Slot)

    @classmethod
    def of(cls, model: nn.Module, batch: int, device: torch.device) -> Decoding:
        """Of a model and so many sequences."""
        zeros = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        return cls(model, zeros, zeros[:1].clone())

    def restart(self, position: int) -> None:
        """Take the first token of the vocabulary, at this position, as the newest."""
        self.token.zero_()
        self.position.fill_(position)

    def step(self, attend: Attend) -> Tensor:
        """Put the next token in the place of the newest; returns logits [B, vocabulary]."""
        self.slot.attend = attend
        logits: Tensor = self.model(
            input_ids=self.token, position_ids=self.position, use_cache=False, slot=self.slot
        ).logits[:, -1]
        self.slot.attend = None
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits
