"""Collisions: how likely a key is found in hash tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.core.checks import keep_ints


@dataclass(frozen=True)
class Collisions:
    """Sampling by random hyperplanes: `tables` tables of `bits` bits, a key is found that collides in two at least.

    A bit of two vectors agrees with probability p = 1 - angle / pi (Charikar, STOC 2002), a table's bits with p^bits,
    and so two tables at least with 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L-1) (MagicPIG, arXiv 2410.16179).
    """

    tables: int = 150
    bits: int = 10

    def __post_init__(self) -> None:
        keep_ints(self, tables=2, bits=1)

    def probability(self, cosine: Tensor) -> Tensor:
        """That a key at this cosine to the query is found, float64."""
        agree = 1 - torch.acos(cosine.double().clamp(-1, 1)) / math.pi
        table = agree**self.bits
        none_or_one = (self.tables - 1) * torch.log1p(-table) + torch.log1p((self.tables - 1) * table)
        return -torch.expm1(none_or_one)
