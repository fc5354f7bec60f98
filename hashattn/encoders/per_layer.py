"""PerLayer: one encoder for each layer of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hashattn.core.model_facts import ModelFacts
from hashattn.encoders.base import Encoder
from hashattn.ops.decode import Map

_UNBOUND = "PerLayer holds one encoder a layer: call attn.layer(i), or encoder.layer(i), and encode with that"


class PerLayer(nn.Module, Encoder):
    """Holds the encoders of a model's layers; attn.layer(i) picks one. It encodes nothing itself.

    Args:
        encoders: nn.Module encoders of one code length: one for every layer of the model, or {layer: encoder} for those
            that are served (dense and sliding-window layers need none).
        facts: of the model that they were fitted to; attach() then refuses any other. None if nobody knows.
    """

    def __init__(
        self, encoders: Sequence[nn.Module] | Mapping[int, nn.Module], facts: ModelFacts | None = None
    ) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("encoders must hold at least one encoder, got none")
        numbered = encoders if isinstance(encoders, Mapping) else dict(enumerate(encoders))
        for i, encoder in numbered.items():
            if type(i) is not int or i < 0:
                raise TypeError(f"encoders must be numbered by layers from 0, got {i!r}")
            if not (isinstance(encoder, Encoder) and isinstance(encoder, nn.Module)):
                raise TypeError(f"encoders[{i}] must be an encoder with weights, got {type(encoder).__name__}")
        lengths = {e.bits for e in numbered.values() if isinstance(e, Encoder)}
        if len(lengths) > 1:
            raise ValueError(f"encoders must share one code length, got {sorted(lengths)} bits")
        if len({e.biased for e in numbered.values() if isinstance(e, Encoder)}) > 1:
            raise ValueError("encoders must all have a bias in their codes, or none")
        if len({e.code for e in numbered.values() if isinstance(e, Encoder)}) > 1:
            raise ValueError("encoders must all make one kind of code")
        self.encoders = nn.ModuleDict({str(i): numbered[i] for i in sorted(numbered)})
        self.facts = facts
        self.bits, self.query_bits = lengths.pop(), self._first.query_bits

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have an encoder, ascending."""
        return tuple(int(i) for i in self.encoders)

    @property
    def _first(self) -> Encoder:
        return self.layer(self.layers[0])

    @property
    def code(self) -> str:  # type: ignore[override]
        return self._first.code

    @property
    def biased(self) -> bool:  # type: ignore[override]
        return self._first.biased

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        return self._first.code_bytes(head_dim, itemsize)

    def code_heads(self, kv_heads: int) -> int:
        return self._first.code_heads(kv_heads)

    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        return self._first.widths()

    @property
    def angular(self) -> bool:  # type: ignore[override]
        return self._first.angular

    def layer(self, i: int) -> Encoder:
        if str(i) not in self.encoders:
            held = f"{len(self.encoders)}, of layers {', '.join(self.encoders)}"
            raise ValueError(f"layer {i} has no encoder: this PerLayer holds {held}; name others in dense_layers")
        encoder = self.encoders[str(i)]
        assert isinstance(encoder, Encoder)
        return encoder

    def for_heads(self, first: int, count: int) -> PerLayer:
        part = copy.copy(self)
        parts = nn.ModuleDict()
        for i in self.layers:
            one = self.layer(i).for_heads(first, count)
            assert isinstance(one, nn.Module)
            parts[str(i)] = one
        part._modules = {"encoders": parts}
        return part

    def maps(self, head_dim: int, device: torch.device) -> tuple[Map, Map]:
        raise TypeError(_UNBOUND)

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        raise TypeError(_UNBOUND)

    def encode_query(self, q: Tensor) -> Tensor:
        raise TypeError(_UNBOUND)
