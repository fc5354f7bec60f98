"""PerLayer: one encoder for each layer of a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hashattn.encoders.base import Encoder

_UNBOUND = "PerLayer holds one encoder a layer: call attn.layer(i), or encoder.layer(i), and encode with that"


class PerLayer(nn.Module, Encoder):
    """Holds the encoder of every layer; attn.layer(i) picks one. It encodes nothing itself.

    Args:
        encoders: one nn.Module encoder a layer, of the same code length.
    """

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("encoders must hold at least one encoder, got none")
        for i, encoder in enumerate(encoders):
            if not (isinstance(encoder, Encoder) and isinstance(encoder, nn.Module)):
                raise TypeError(f"encoders[{i}] must be an encoder with weights, got {type(encoder).__name__}")
        lengths = {e.bits for e in encoders if isinstance(e, Encoder)}
        if len(lengths) > 1:
            raise ValueError(f"encoders must share one code length, got {sorted(lengths)} bits")
        self.encoders = nn.ModuleList(encoders)
        self.bits = lengths.pop()

    def code_heads(self, kv_heads: int) -> int:
        return self.layer(0).code_heads(kv_heads)

    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        return self.layer(0).widths()

    def layer(self, i: int) -> Encoder:
        if not 0 <= i < len(self.encoders):
            raise ValueError(f"layer {i} has no encoder: this PerLayer holds {len(self.encoders)}")
        encoder = self.encoders[i]
        assert isinstance(encoder, Encoder)
        return encoder

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        raise TypeError(_UNBOUND)

    def encode_query(self, q: Tensor) -> Tensor:
        raise TypeError(_UNBOUND)
