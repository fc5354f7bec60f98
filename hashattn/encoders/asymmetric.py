"""AsymmetricHash: different networks for queries and keys."""

from __future__ import annotations

from torch import Tensor

from hashattn.core.checks import check_int
from hashattn.encoders.centring import Centring
from hashattn.encoders.hash_net import HashNet
from hashattn.encoders.learned import DEFAULT_CENTRING, LearnedHash


class AsymmetricHash(LearnedHash):
    """Asymmetric deep hashing of DASH-KV (arXiv 2604.19351): an MLP for queries, one linear map for keys.

    Queries are used once, so precision is spent on them; keys are encoded once and scanned at every later step.
    Both maps start as the planes of SimHash, through a linear skip beside the MLP, whose last layer starts at zero.

    Args:
        bits: length of a code, 8 to 1024.
        query_hidden: hidden widths of the query MLP, (256, 256) in DASH-KV; () for a linear query.
        key_hidden: hidden widths for keys, () in DASH-KV; HashAttention (arXiv 2412.14468) uses (128, 128) for both.
        query_bits: 1, 2, 4 or 8 bit planes for queries.
        heads: weight sets: None shares one among all heads, Hkv gives each KV head its own, Hq each query head
            (keys are then encoded once per query head).
        centring: frozen centre of rows while unfitted, as in SimHash; None for none.
        seed: of the initial planes and weights.
        bias_bits: 8 gives the last byte of a code to a learned scalar of the key (query_bits=1 only; see
            :class:`hashattn.encoders.bias.KeyBias`); 0 for none.
    """

    def __init__(
        self,
        bits: int = 128,
        *,
        query_hidden: tuple[int, ...] = (256, 256),
        key_hidden: tuple[int, ...] = (),
        query_bits: int = 1,
        heads: int | None = None,
        centring: Centring | None = DEFAULT_CENTRING,
        seed: int = 0,
        bias_bits: int = 0,
    ) -> None:
        super().__init__(bits, query_bits, heads, centring, seed, bias_bits)
        self.query_hidden = tuple(check_int("query_hidden", width, 1) for width in query_hidden)
        self.key_hidden = tuple(check_int("key_hidden", width, 1) for width in key_hidden)

    def _make_nets(self, planes: Tensor) -> tuple[HashNet, HashNet]:
        heads = self.heads or 1
        return (
            HashNet(planes, self.query_hidden, heads, self.seed),
            HashNet(planes, self.key_hidden, heads, self.seed + 1),
        )

    def _hidden(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.query_hidden, self.key_hidden
