"""Asymmetric LSH for inner products: keys get more coordinates, so that the largest product is the nearest point."""

from __future__ import annotations

from abc import ABC
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from hashattn.core.checks import check_int, check_number, check_seed
from hashattn.core.lasting import lasting
from hashattn.encoders.base import check_bits, key_bits, query_planes, subtract
from hashattn.encoders.fitted import FittedEncoder
from hashattn.encoders.simhash import orthogonal_planes
from hashattn.ops.hamming import pack_bits


class ALSH(FittedEncoder, ABC):
    """What both kinds share: fit() measures the largest key norm M of each KV head; longer keys count as that long.

    Hamming distances fall with the true inner product q.k, long keys first, and tell no angle between q and k: they
    are meant for selectors that rank by q.k, not for attends that estimate logits from angles (MixedPrecision) nor
    for scores that are multiplied by the key's norm again. Keys are not centred.
    """

    angular = False
    limit: Tensor  # [Hkv]

    def __init__(self, bits: int, query_bits: int, seed: int) -> None:
        super().__init__("limit")
        (self.bits, self.query_bits), self.seed = check_bits(bits, query_bits), check_seed(seed)

    def fit(self, q: Tensor | None, k: Tensor) -> Self:
        """Measure the key norms of keys [B, Hkv, N, D]; queries play no part. Returns itself.

        Raises:
            ValueError: no keys, or keys that are not finite.
        """
        keys = self._pooled(k, 1)
        self._fill(k.device, limit=keys.norm(dim=-1).amax(1))
        return self

    def shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        return ((kv_heads,),)

    def _scaled(self, k: Tensor, centre: Tensor | None) -> Tensor:
        """Keys over M, float32 [B, Hkv, N, D], of norm at most 1."""
        self.check_fitted()
        x = subtract(k, centre) / self.limit[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1)


class SimpleLSH(ALSH):
    """Simple-LSH (Neyshabur and Srebro, ICML 2015): x = k / M gets the coordinate sqrt(1 - |x|^2), then sign planes.

    Two codes differ in a bit with probability acos(q.k / (|q| M)) / pi.

    Args:
        bits: length of a code, 8 to 1024.
        query_bits: 1, 2, 4 or 8 bit planes for queries.
        seed: of the planes, which all layers and heads share.
    """

    def __init__(self, bits: int = 128, *, query_bits: int = 1, seed: int = 0) -> None:
        super().__init__(bits, query_bits, seed)

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        x = self._scaled(k, centre)
        lift = (1 - x.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
        return key_bits(torch.cat((x, lift), -1) @ self._planes(k))

    def encode_query(self, q: Tensor) -> Tensor:
        self.check_fitted()
        return query_planes(q.float() @ self._planes(q)[:-1], self.query_bits)

    def _planes(self, x: Tensor) -> Tensor:
        return orthogonal_planes(x.shape[-1] + 1, self.bits, self.seed, x.device)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, query_bits={self.query_bits}, fitted={self.fitted}"


class L2ALSH(ALSH):
    """L2-ALSH (Shrivastava and Li, NIPS 2014): x = U k / M gets |x|^2, |x|^4, ... and q / |q| gets halves.

    That makes |P(x) - Q(q)|^2 = 1 + m/4 - 2 U q.k / (|q| M) + |x|^(2^(m+1)), whose last term vanishes. Each hash
    floor((a.v + b) / r) of that distance d keeps its lowest bit, where the paper keeps the whole number. Two codes
    differ in a bit with probability 1/2 - 4/pi^2 sum over odd n of exp(-(n pi d / r)^2 / 2) / n^2.

    Args:
        bits: length of a code, 8 to 1024.
        powers: m, how many coordinates are added; 3 in the paper.
        norm: U, the norm of the longest key, below 1; 0.83 in the paper.
        width: r, of a hash's intervals; 2.5 in the paper.
        seed: of the hashes, which all layers and heads share.
    """

    def __init__(
        self, bits: int = 128, *, powers: int = 3, norm: float = 0.83, width: float = 2.5, seed: int = 0
    ) -> None:
        super().__init__(bits, 1, seed)
        powers = check_int("powers", powers, 1, 32)
        norm, width = check_number("norm", norm), check_number("width", width)
        if not (0 < norm < 1 and width > 0):
            raise ValueError(f"norm must be between 0 and 1 and width above 0, got {norm!r} and {width!r}")
        self.powers, self.norm, self.width = powers, norm, width

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        x = self._scaled(k, centre) * self.norm
        square = x.square().sum(-1, keepdim=True)
        return self._hash(torch.cat([x, *(square ** (2**i) for i in range(self.powers))], -1))

    def encode_query(self, q: Tensor) -> Tensor:
        self.check_fitted()
        q = q.float()
        unit = q / q.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return self._hash(torch.cat((unit, unit.new_full((*q.shape[:-1], self.powers), 0.5)), -1))

    def _hash(self, v: Tensor) -> Tensor:
        directions, offsets = gaussian_hashes(v.shape[-1], self.bits, self.seed, v.device)
        return pack_bits(torch.floor(v @ directions / self.width + offsets).remainder(2) == 1)

    def extra_repr(self) -> str:
        given = f"powers={self.powers}, norm={self.norm}, width={self.width}"
        return f"bits={self.bits}, {given}, fitted={self.fitted}"


@lru_cache(maxsize=64)
@lasting
def gaussian_hashes(dim: int, bits: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gaussian directions [dim, bits] and offsets [bits] in [0, 1), float32; do not write to them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(dim, bits, generator=generator)
    return directions.to(device), torch.rand(bits, generator=generator).to(device)
