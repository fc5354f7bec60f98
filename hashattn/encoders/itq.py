"""ITQ: PCA, then the rotation that loses least to the signs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hashattn.encoders.base import Encoder, check_bits, key_bits, query_planes, subtract
from hashattn.extras import require


class ITQ(nn.Module, Encoder):
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
        super().__init__()
        check_bits(bits, query_bits)
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        self.bits, self.query_bits, self.iterations, self.seed = bits, query_bits, iterations, seed
        self.projection: Tensor
        self.mean: Tensor
        self.register_buffer("projection", torch.empty(0))  # [Hkv, D, bits]
        self.register_buffer("mean", torch.empty(0))  # [Hkv, D]

    @property
    def fitted(self) -> bool:
        return self.projection.numel() > 0

    def fit(self, q: Tensor | None, k: Tensor) -> ITQ:
        """Fit to keys [B, Hkv, N, D]; queries play no part. Needs scipy. Returns itself.

        Raises:
            ValueError: fewer keys than head_dim, from which no principal axes can be had.
        """
        scipy_linalg = require("scipy.linalg", "fit", "ITQ.fit")
        dim = k.shape[-1]
        keys = k.detach().double().transpose(0, 1).flatten(1, 2).cpu()  # [Hkv, B*N, D]
        if keys.shape[1] < dim:
            raise ValueError(f"k must hold at least head_dim = {dim} keys a head to fit ITQ, got {keys.shape[1]}")
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
        self.projection = torch.stack(heads).float().to(k.device)
        self.mean = mean.float().to(k.device)
        self.fits += 1
        return self

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        if self.fitted and self.projection.shape[:2] != (kv_heads, head_dim):
            heads, dim = self.projection.shape[:2]
            raise ValueError(
                f"this ITQ was fitted to {heads} KV heads of head_dim {dim}, but was given {kv_heads} of {head_dim}"
            )

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        self._check_fitted()
        return key_bits(subtract(k, self.mean.unsqueeze(0)) @ self.projection)

    def encode_query(self, q: Tensor) -> Tensor:
        self._check_fitted()
        grouped = q.float().reshape(q.shape[0], len(self.projection), -1, q.shape[-1])  # [B, Hkv, G*T, D]
        return query_planes((grouped @ self.projection).view(*q.shape[:3], self.bits), self.query_bits)

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError("this ITQ is not fitted: call fit(q, k) with keys of the model, or load its state_dict")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in ("projection", "mean"):  # their shapes are known only once fitted
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.projection.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.fits += 1

    def extra_repr(self) -> str:
        return f"bits={self.bits}, query_bits={self.query_bits}, fitted={self.fitted}"
