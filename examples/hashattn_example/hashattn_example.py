"""An encoder and a preset of a package of its own: signs of the keys, without any projection."""

from dataclasses import dataclass, field

from torch import Tensor

from hashattn import Centring, Encoder, FlatHamming, HashAttention, Recent, Sink, TopK
from hashattn.encoders.base import key_bits, query_planes, subtract


@dataclass(frozen=True)
class Signs(Encoder):
    """One bit a channel: the sign of a key less its row's centre. A query has query_bits of 1, 2, 4 or 8 planes."""

    bits: int = 64  # head_dim
    query_bits: int = 1
    centring: Centring | None = field(default_factory=Centring)

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        if head_dim != self.bits:
            raise ValueError(f"bits must be head_dim = {head_dim}, got {self.bits}")

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        return key_bits(subtract(k, centre))

    def encode_query(self, q: Tensor) -> Tensor:
        return query_planes(q.float(), self.query_bits)


def sign_topk(*, bits: int = 64, share: float = 0.05, engine: str = "auto") -> HashAttention:
    """Signs of the channels themselves, and exact attention to the keys of most common ones; bits is head_dim."""
    return HashAttention(Signs(bits), FlatHamming(), Sink(4) | Recent(64) | TopK(share=share), engine=engine)
