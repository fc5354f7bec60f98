"""SimHash: signs of random projections."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from hashattn.core.checks import check_seed, keep_ints
from hashattn.core.lasting import lasting
from hashattn.encoders.base import (
    Encoder,
    check_bits,
    key_bits,
    query_planes,
    subtract,
)
from hashattn.encoders.centring import Centring, check_centring
from hashattn.ops.decode import Map


@lru_cache(maxsize=64)
@lasting
def orthogonal_planes(dim: int, bits: int, seed: int, device: torch.device) -> Tensor:
    """float32 [dim, bits]: blocks of orthonormal random directions (Super-Bit, Ji et al. 2012); do not write to it."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-bits // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        blocks.append(q * r.diagonal().sign())  # the sign makes the directions independent of the QR's conventions
    return torch.cat(blocks, dim=1)[:, :bits].float().to(device)


@lru_cache(maxsize=64)
@lasting
def independent_planes(dim: int, bits: int, seed: int, device: torch.device) -> Tensor:
    """float32 [dim, bits]: independent Gaussian directions (Charikar 2002); do not write to it."""
    return torch.randn(dim, bits, generator=torch.Generator().manual_seed(seed)).to(device)


@dataclass(frozen=True)
class SimHash(Encoder):
    """Signs of random projections of centred keys (Charikar 2002): two codes differ in a bit with probability angle/pi.

    Args:
        bits: length of a code, 8 to 4096; more than 1024 are for many hash tables.
        query_bits: 1 scores sign bits; 2, 4 or 8 score a query of that many bit planes against the 1-bit keys.
        centring: the frozen centre that is subtracted from a row's keys; None subtracts nothing, and no row is too
            short to be searched.
        seed: of the projections, which all layers and heads share.
        orthogonal: take the directions in orthogonal blocks, which estimates angles better; False takes independent
            ones, whose bits agree independently, as the theory of hash tables asks.
    """

    bits: int = 128
    query_bits: int = 1
    centring: Centring | None = field(default_factory=Centring)
    seed: int = 0
    orthogonal: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits, self.query_bits, most=4096)
        keep_ints(self, bits=8, query_bits=1)
        check_centring(self.centring)
        object.__setattr__(self, "seed", check_seed(self.seed))

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        return key_bits(subtract(k, centre) @ self._planes(k.shape[-1], k.device))

    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), ()

    def maps(self, head_dim: int, device: torch.device) -> tuple[Map, Map]:
        planes = Map(self._planes(head_dim, device).contiguous())
        return planes, planes

    def encode_query(self, q: Tensor) -> Tensor:
        return query_planes(q.float() @ self._planes(q.shape[-1], q.device), self.query_bits)

    def _planes(self, dim: int, device: torch.device) -> Tensor:
        return (orthogonal_planes if self.orthogonal else independent_planes)(dim, self.bits, self.seed, device)
