"""SymmetricHash: one network for queries and keys."""

from __future__ import annotations

from torch import Tensor

from hashattn.encoders.centring import Centring
from hashattn.encoders.hash_net import HashNet
from hashattn.encoders.learned import DEFAULT_CENTRING, LearnedHash


class SymmetricHash(LearnedHash):
    """One learned linear map, shared by queries and keys: HATA (arXiv 2506.02572), and DASH-KV's symmetric ablation.

    Args:
        bits: length of a code, 8 to 1024.
        query_bits: 1, 2, 4 or 8 bit planes for queries.
        heads: weight sets: None shares one among all heads, Hkv gives each KV head its own.
        centring: frozen centre of rows while unfitted, as in SimHash; None for none.
        seed: of the initial planes.
        bias_bits: 8 or 0, as in AsymmetricHash.
    """

    def __init__(
        self,
        bits: int = 128,
        *,
        query_bits: int = 1,
        heads: int | None = None,
        centring: Centring | None = DEFAULT_CENTRING,
        seed: int = 0,
        bias_bits: int = 0,
    ) -> None:
        super().__init__(bits, query_bits, heads, centring, seed, bias_bits)

    def _make_nets(self, planes: Tensor) -> tuple[HashNet, HashNet]:
        net = HashNet(planes, (), self.heads or 1, self.seed)
        return net, net

    def _hidden(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), ()
