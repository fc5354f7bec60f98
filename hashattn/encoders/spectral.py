"""SpectralHash: signs of the smoothest waves along the principal axes of the keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hashattn.encoders.base import check_bits, key_bits, subtract
from hashattn.encoders.fitted import FittedEncoder


class SpectralHash(FittedEncoder):
    """Spectral hashing (Weiss, Torralba and Fergus, NIPS 2008), fitted to keys, one set of waves a KV head.

    fit() takes the principal axes of a head's keys and the range [a, b] of its keys on each; a uniform distribution
    there has the eigenfunctions cos(j pi (x - a) / (b - a)) with eigenvalues that grow with j / (b - a), and those
    with the `bits` smallest ones are kept (all axes together, j from 1 on). The method preserves distances among
    points of one distribution. Queries are of another, so each is first given the root mean square norm of the
    centred keys: the nearest points are then those of the largest inner product, as far as key norms are alike. The
    paper has no such step.

    Args:
        bits: length of a code, 8 to 1024.
    """

    angular = False

    def __init__(self, bits: int = 128) -> None:
        super().__init__("projection", "mean", "phase", "radius")
        self.bits, _ = check_bits(bits)
        self.projection: Tensor  # [Hkv, D, bits], axes times j pi / (b - a)
        self.mean: Tensor  # [Hkv, D]
        self.phase: Tensor  # [Hkv, bits], -a j pi / (b - a)
        self.radius: Tensor  # [Hkv]

    def fit(self, q: Tensor | None, k: Tensor) -> SpectralHash:
        """Fit to keys [B, Hkv, N, D]; queries play no part. Returns itself.

        Raises:
            ValueError: keys that are not finite, or fewer than head_dim, from which no principal axes can be had.
        """
        keys = self._pooled(k)
        mean = keys.mean(1)
        centred = keys - mean.unsqueeze(1)
        _, axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
        along = centred @ axes  # [Hkv, B*N, D]
        low, extent = along.amin(1), along.amax(1) - along.amin(1)
        extent = extent.clamp(min=1e-6 * float(extent.max()) or 1.0)  # an axis without extent comes last
        waves = math.pi * torch.arange(1, self.bits + 1) / extent.unsqueeze(-1)  # [Hkv, D, j]
        frequency, flat = waves.flatten(1).topk(self.bits, largest=False)  # [Hkv, bits]
        axis = flat // self.bits
        self._fill(
            k.device,
            projection=frequency.unsqueeze(1) * axes.gather(2, axis.unsqueeze(1).expand(-1, k.shape[3], -1)),
            mean=mean,
            phase=-frequency * low.gather(1, axis),
            radius=centred.square().sum(-1).mean(1).sqrt(),
        )
        return self

    def shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        return (kv_heads, head_dim, self.bits), (kv_heads, head_dim), (kv_heads, self.bits), (kv_heads,)

    @property
    def fitted_centre(self) -> Tensor | None:
        return self.mean if self.fitted else None

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        self.check_fitted()
        return key_bits(torch.cos(subtract(k, self.mean.unsqueeze(0)) @ self.projection + self.phase.unsqueeze(1)))

    def encode_query(self, q: Tensor) -> Tensor:
        self.check_fitted()
        group = q.shape[1] // len(self.radius)
        radius, phase = (x.repeat_interleave(group, 0).unsqueeze(1) for x in (self.radius.unsqueeze(1), self.phase))
        q = q.float()
        q = q * (radius / q.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
        return key_bits(torch.cos(self._by_head(q, self.projection) + phase))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, fitted={self.fitted}"
