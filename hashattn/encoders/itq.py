"""ITQ: PCA, then the rotation that loses least to the signs."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.core.checks import check_int, check_seed
from hashattn.core.extras import require
from hashattn.encoders.base import check_bits, key_bits, query_planes, subtract
from hashattn.encoders.fitted import FittedEncoder


class ITQ(FittedEncoder):
    """Iterative quantisation (Gong and Lazebnik, CVPR 2011), fitted to keys, one rotation a KV head.

    fit() centres a head's keys, rotates them to their principal axes and alternates B = sign(V R) with the
    orthogonal Procrustes solution for R. Codes longer than head_dim take several rotations of the same axes, each
    from its own random start. The centre is the fitted one, so no row is too short.

    Args:
        bits: length of a code, 8 to 1024.
        query_bits: 1, 2, 4 or 8 bit planes for queries.
        iterations: of the alternation; the paper uses 50.
        seed: of the random starts.
    """

    def __init__(self, bits: int = 128, *, query_bits: int = 1, iterations: int = 50, seed: int = 0) -> None:
        super().__init__("projection", "mean")
        self.bits, self.query_bits = check_bits(bits, query_bits)
        self.iterations, self.seed = check_int("iterations", iterations, 1), check_seed(seed)
        self.projection: Tensor  # [Hkv, D, bits]
        self.mean: Tensor  # [Hkv, D]

    def fit(self, q: Tensor | None, k: Tensor) -> ITQ:
        """Fit to keys [B, Hkv, N, D]; queries play no part. Needs scipy. Returns itself.

        Raises:
            ValueError: keys that are not finite, or fewer than head_dim, from which no principal axes can be had.
        """
        scipy_linalg = require("scipy.linalg", "fit", "ITQ.fit")
        keys = self._pooled(k)
        dim = k.shape[-1]
        mean = keys.mean(1)
        generator = torch.Generator().manual_seed(self.seed)
        heads = []
        for centred in keys - mean.unsqueeze(1):
            _, axes = torch.linalg.eigh(centred.T @ centred)
            blocks = []
            for first in range(0, self.bits, dim):
                width = min(dim, self.bits - first)
                components = axes[:, -width:]  # eigh sorts ascending
                v = centred @ components
                rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
                for _ in range(self.iterations):
                    u, _, vt = scipy_linalg.svd((torch.sign(v @ rotation).T @ v).numpy())
                    rotation = torch.from_numpy(vt.T @ u.T)
                blocks.append(components @ rotation)
            heads.append(torch.cat(blocks, dim=1))
        self._fill(k.device, projection=torch.stack(heads), mean=mean)
        return self

    def shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        return (kv_heads, head_dim, self.bits), (kv_heads, head_dim)

    @property
    def fitted_centre(self) -> Tensor | None:
        return self.mean if self.fitted else None

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        self.check_fitted()
        return key_bits(subtract(k, self.mean.unsqueeze(0)) @ self.projection)

    def encode_query(self, q: Tensor) -> Tensor:
        self.check_fitted()
        return query_planes(self._by_head(q, self.projection), self.query_bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, query_bits={self.query_bits}, fitted={self.fitted}"
