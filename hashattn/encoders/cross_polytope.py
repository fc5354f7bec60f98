"""CrossPolytope: the nearest of the axes, after a random rotation, as the number of a bucket."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.core.checks import check_int, check_seed, keep_ints
from hashattn.core.lasting import lasting
from hashattn.encoders.base import Encoder, subtract
from hashattn.encoders.centring import Centring, check_centring


@lru_cache(maxsize=64)
@lasting
def rotations(dim: int, rounds: int, half: int, seed: int, device: torch.device) -> Tensor:
    """Orthonormal random directions of each round, float32 [dim, rounds * half]; do not write to it."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(rounds, dim, half, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # independent of the QR's conventions
    return q.transpose(0, 1).reshape(dim, -1).float().to(device)


@dataclass(frozen=True)
class CrossPolytope(Encoder):
    """Rotation LSH (Andoni et al. 2015; Reformer, arXiv 2001.04451): argmax([x R; -x R]) in each round.

    Codes hold a byte a round, in int64 words: 8 * ceil(rounds / 8) bytes a key. For FlatBuckets, which counts the
    rounds in which query and key fall into different buckets. Reformer shares one projection for queries and keys,
    sorts by bucket and attends within chunks; here queries and keys are different vectors, keys are centred, R has
    orthonormal columns where Reformer draws Gaussian ones, and every bucket is compared.

    Args:
        rounds: how many rotations, 1 to 128.
        buckets: of a round: even, 2 to 256 and at most 2 * head_dim. They take a byte however many they are.
        centring: the frozen centre that is subtracted from a row's keys; None subtracts nothing.
        seed: of the rotations, which all layers and heads share.
    """

    code = "buckets"

    rounds: int = 16
    buckets: int = 64
    centring: Centring | None = field(default_factory=Centring)
    seed: int = 0

    def __post_init__(self) -> None:
        keep_ints(self, rounds=1, buckets=2)
        check_centring(self.centring)
        check_int("rounds", self.rounds, 1, 128)
        object.__setattr__(self, "seed", check_seed(self.seed))
        if self.buckets > 256 or self.buckets % 2:
            raise ValueError(f"buckets must be even and from 2 to 256, got {self.buckets!r}")

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        if self.buckets > 2 * head_dim:
            raise ValueError(f"buckets must be at most 2 * head_dim = {2 * head_dim}, got {self.buckets}")

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        return 8 * -(-self.rounds // 8)

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        """int64 [B, Hkv, N, ceil(rounds / 8)]."""
        return self._hash(subtract(k, centre))

    def encode_query(self, q: Tensor) -> Tensor:
        """int64 [B, Hq, T, ceil(rounds / 8)]."""
        return self._hash(q.float())

    def _hash(self, x: Tensor) -> Tensor:
        self.check_model(1, 1, x.shape[-1])
        half = self.buckets // 2
        projection = (x @ rotations(x.shape[-1], self.rounds, half, self.seed, x.device)).unflatten(-1, (-1, half))
        axis = projection.abs().argmax(-1, keepdim=True)  # [B, H, N, rounds, 1]
        bucket = (axis + half * (projection.gather(-1, axis) < 0)).squeeze(-1).to(torch.uint8)
        return F.pad(bucket, (0, -self.rounds % 8)).view(torch.int64)
