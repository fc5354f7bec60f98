"""The model that generates: one that is loaded, or random weights of a named shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from hashattn.lab.bench.cases import DTYPES
from hashattn.lab.bench.e2e_model import Llama, from_config
from hashattn.lab.workload.model import check_source, load, name_of
from hashattn.lab.workload.prefill import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKED_LAYERS = 4
NAMED_SHAPES = {
    "llama-3-8b": Llama(),
    "llama-3.2-3b": Llama(layers=28, hidden=3072, q_heads=24, intermediate=8192),
    "llama-3.2-1b": Llama(layers=16, hidden=2048, head_dim=64, intermediate=8192),
    "mistral-7b": Llama(vocabulary=32768),
    "smollm2-135m": Llama(30, hidden=576, q_heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocabulary=49152),
    "tiny": Llama(3, hidden=64, q_heads=4, kv_heads=2, head_dim=64, intermediate=128, vocabulary=512),
}


@dataclass(frozen=True)
class Source:
    """Which model is measured.

    Attributes:
        model: as load() takes it; None for random weights
        shape: of this name,
        layers: and so many layers; None for the shape's own.
        dtype: of the weights, by name.
    """

    model: str | None = None
    shape: str = "tiny"
    layers: int | None = None
    dtype: str = "float32"

    def check(self) -> None:
        """Raise ValueError for what cannot be made, as far as that can be told without reading it."""
        if self.model is not None:
            check_source(self.model)
        if self.model is not None and self.layers is not None:
            raise ValueError(f"--layers cuts a --shape down; --model {self.model} keeps its own: leave --layers out")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"--layers must be at least 1, got {self.layers}")

    def make(self, device: torch.device) -> PreTrainedModel:
        """The model on the device, in which no token ends a text."""
        dtype = DTYPES[self.dtype]
        if self.model is not None:
            network, _ = load(self.model, dtype=dtype, device=device)
        else:
            shape = NAMED_SHAPES[self.shape]
            size = replace(shape, dtype=dtype, layers=self.layers or shape.layers)
            # Each map keeps the size of what it is given, so that attention counts in the logits of any shape.
            config = {"initializer_range": size.hidden**-0.5, "eos_token_id": None, "bos_token_id": None}
            network = cast("PreTrainedModel", from_config(size, device, attn_implementation="sdpa", **config))
        assert network.generation_config is not None
        network.generation_config.eos_token_id = None
        return network

    def for_checks(self) -> Source:
        """The same with few layers, where that can be had: it compiles sooner."""
        if self.model is not None:
            return self
        return replace(self, layers=min(self.layers or NAMED_SHAPES[self.shape].layers, CHECKED_LAYERS))

    def described(self) -> dict[str, object]:
        """What results say of it."""
        if self.model is not None:
            return {"model": name_of(self.model), "weights": "its own", "dtype": self.dtype}
        layers = self.layers or NAMED_SHAPES[self.shape].layers
        return {"model": f"{self.shape}, {layers} layers", "weights": "random", "dtype": self.dtype}


def random_prompt(network: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """int64 [batch, tokens] on the model's device, the same for every contender."""
    drawn = torch.Generator().manual_seed(tokens)
    words = network.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, words, (batch, tokens), generator=drawn).to(network.device)


def check_positions(network: PreTrainedModel, tokens: int) -> None:
    """Raise ValueError if the model has no positions for so many tokens."""
    limit = positions_of(network)
    if limit is not None and tokens > limit:
        raise ValueError(f"--tokens: with what is written a text has {tokens:,}, and the model {limit:,} positions")
