"""PCA: the first coordinates of keys in their principal axes."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.core.checks import check_int
from hashattn.encoders.fitted import FittedEncoder


class PCA(FittedEncoder):
    """Low-rank keys (Loki, Singhania et al., arXiv 2406.02542): inner products over the first principal axes alone.

    fit() takes the eigenvectors of the covariance of a head's post-RoPE keys. Codes are the keys' coordinates on the
    first `components` axes, in the keys' dtype; queries are projected by their KV head's axes, in float32. With
    FlatDot a query reads components / D of the bytes of the keys. The mean is not subtracted: it adds the same to all
    scores of a query.

    Args:
        components: coordinates that are kept, at most head_dim; the paper scores a quarter of head_dim.
    """

    code = "vector"

    def __init__(self, components: int) -> None:
        super().__init__("projection")
        self.components = check_int("components", components, 1, hint="say head_dim / 4")
        self.projection: Tensor  # [Hkv, D, components]

    def fit(self, q: Tensor | None, k: Tensor) -> PCA:
        """Fit to keys [B, Hkv, N, D]; queries play no part. Returns itself.

        Raises:
            ValueError: keys that are not finite, or fewer than head_dim; components above head_dim.
        """
        keys = self._pooled(k)
        self._check_components(k.shape[3])
        centred = keys - keys.mean(1, keepdim=True)
        _, axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred)  # ascending
        self._fill(k.device, projection=axes.flip(-1)[..., : self.components])
        return self

    def shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        return ((kv_heads, head_dim, self.components),)

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        self._check_components(head_dim)
        super().check_model(q_heads, kv_heads, head_dim)

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        return self.components * itemsize

    def query_shape(self, head_dim: int) -> tuple[int, int]:
        return 1, self.components

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        """Coordinates of keys [B, Hkv, N, D], in their dtype: [B, Hkv, N, components]."""
        self.check_fitted()
        return (k.float() @ self.projection).to(k.dtype)

    def encode_query(self, q: Tensor) -> Tensor:
        """Coordinates of queries [B, Hq, T, D]: float32 [B, Hq, T, components]."""
        self.check_fitted()
        return self._by_head(q, self.projection)

    def _check_components(self, head_dim: int) -> None:
        if self.components > head_dim:
            raise ValueError(f"components must be at most head_dim = {head_dim}, got {self.components}")

    def extra_repr(self) -> str:
        return f"components={self.components}, fitted={self.fitted}"
