"""RaBitQ: one bit a dimension after a random rotation, and two numbers that make the estimate unbiased."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hashattn.core.checks import check_seed, keep_ints
from hashattn.encoders.base import Encoder, check_bits, key_bits, subtract
from hashattn.encoders.centring import Centring, check_centring
from hashattn.encoders.simhash import orthogonal_planes
from hashattn.ops.hamming import words


@dataclass(frozen=True)
class RaBitQ(Encoder):
    """RaBitQ (Gao and Long, SIGMOD 2024, arXiv 2405.12497): signs of the rotated, centred key o, and two scalars.

    With o_bar the unit vector of those signs, <o_bar, q> / <o_bar, o> estimates <o, q> / |o| without bias over random
    rotations, and errs by more than sqrt((1 - <o_bar, o>^2) / <o_bar, o>^2) eps / sqrt(D - 1) |q| with a probability
    that falls as exp(-c eps^2) (equations 12 to 14). Codes hold ceil(bits / 64) words of signs and one word with the
    float32 |o| and <o_bar, o / |o|>: 16 + 8 bytes a key at head_dim 128. For FlatRaBitQ. The centre adds the same to
    all scores of a query, so it is left out of the estimate.

    Args:
        bits: signs of a key, at least head_dim: vectors are padded with zeros before the rotation, and D above is
            bits. 0 for head_dim.
        centring: the frozen centre that is subtracted from a row's keys, where the paper has the centroid of a key's
            cluster; None subtracts nothing.
        seed: of the rotation, which all layers and heads share.
    """

    code = "rabitq"

    bits: int = 0
    centring: Centring | None = field(default_factory=Centring)
    seed: int = 0

    def __post_init__(self) -> None:
        keep_ints(self, bits=0)
        check_centring(self.centring)
        if self.bits:
            check_bits(self.bits)
        object.__setattr__(self, "seed", check_seed(self.seed))

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        if self.bits and self.bits < head_dim:
            raise ValueError(f"bits must be at least head_dim = {head_dim}, or 0 for just as many, got {self.bits}")

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        return 8 * (words(self.bits or head_dim) + 1)

    def query_shape(self, head_dim: int) -> tuple[int, int]:
        return 1, (self.bits or head_dim) + 2

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        """int64 [B, Hkv, N, ceil(bits / 64) + 1]."""
        o = self._rotate(subtract(k, centre))
        norm = torch.linalg.vector_norm(o, dim=-1)
        alignment = o.abs().sum(-1) / (norm * math.sqrt(o.shape[-1]))
        scalars = torch.stack((norm, alignment.where(norm > 0, 1.0)), -1)  # [B, Hkv, N, 2]
        return torch.cat((key_bits(o), scalars.view(torch.int64)), -1)

    def encode_query(self, q: Tensor) -> Tensor:
        """Rotated queries, float32 [B, Hq, T, bits]."""
        return self._rotate(q.float())

    def _rotate(self, x: Tensor) -> Tensor:
        self.check_model(1, 1, x.shape[-1])
        length = self.bits or x.shape[-1]
        return x @ self._rotation(length, x.device)[: x.shape[-1]]

    def _rotation(self, bits: int, device: torch.device) -> Tensor:
        """The orthogonal matrix [bits, bits], kept here: a traced step finds it where a cached function is traced."""
        kind = bits, device
        if kind not in self._rotations:
            self._rotations[kind] = orthogonal_planes(bits, bits, self.seed, device)
        return self._rotations[kind]

    @cached_property
    def _rotations(self) -> dict[tuple[int, torch.device], Tensor]:
        return {}
