"""HeavyChannels: the few channels that decide most products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hashattn.core.checks import check_fit, check_int
from hashattn.core.lasting import lasting
from hashattn.encoders.base import Encoder
from hashattn.encoders.fitted import part_of_heads

_STEPS = 15  # between the 16 levels of 4 bits


class HeavyChannels(nn.Module, Encoder):
    """Fixed channels of large products, fitted a KV head: the labels of Double Sparsity (Yang et al. 2024, 2408.07092).

    fit() ranks channels by the mean of |q_c k_c| over pairs of queries and keys. A code is a vector of those channels
    of a key, for FlatDot.

    Args:
        channels: how many of head_dim; the authors' code takes an eighth to a half.
        label_bits: 4 rounds the labels of each key, and a query's channels, to 16 levels that run evenly from their
            least to their largest, as the authors' code does; None does not. It is the rounding only: labels stay in
            the keys' dtype and take no less memory.
    """

    code = "vector"

    @lasting
    def __init__(self, channels: int = 16, *, label_bits: int | None = 4) -> None:
        super().__init__()
        if label_bits not in (None, 4):
            raise ValueError(f"label_bits must be 4 or None, got {label_bits!r}")
        self.channels, self.label_bits = check_int("channels", channels, 1), label_bits
        self.heavy: Tensor
        self.register_buffer("heavy", torch.empty(0, dtype=torch.int64))  # [Hkv, r], ascending

    @property
    def fitted(self) -> bool:
        return self.heavy.numel() > 0

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        return self.channels * itemsize

    def query_shape(self, head_dim: int) -> tuple[int, int]:
        return 1, self.channels

    @lasting
    def fit(self, q: Tensor, k: Tensor) -> HeavyChannels:
        """Fit to queries [B, Hq, T, D] and keys [B, Hkv, N, D]. Returns itself.

        Raises:
            TypeError, ValueError: what check_fit() refuses, more channels than head_dim, or query heads that are no
                multiple of the KV heads.
        """
        check_fit(q=q, k=k)
        kv_heads, dim = k.shape[1], k.shape[-1]
        if self.channels > dim:
            raise ValueError(f"channels must be at most head_dim = {dim}, got {self.channels}")
        if q.shape[1] % kv_heads or q.shape[-1] != dim:
            raise ValueError(
                f"q must have a multiple of {kv_heads} heads of head_dim {dim}, as k has, got {[*q.shape]}"
            )
        asked = q.detach().double().abs().mean((0, 2)).view(kv_heads, -1, dim).mean(1)
        weight = asked * k.detach().double().abs().mean((0, 2))
        self.heavy = weight.topk(self.channels, dim=-1).indices.sort(-1).values
        self.fits += 1
        return self

    def prepare(self, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.heavy = torch.empty((kv_heads, self.channels), dtype=torch.int64, device=device)

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        if not self.fitted:
            return
        least, most = (int(x) for x in self.heavy.aminmax())
        if len(self.heavy) != kv_heads or not 0 <= least <= most < head_dim:
            raise ValueError(
                f"these HeavyChannels were fitted to {len(self.heavy)} KV heads and channels {least} to {most}, but "
                f"were given {kv_heads} heads of head_dim {head_dim}"
            )

    def for_heads(self, first: int, count: int) -> HeavyChannels:
        self.check_fitted()
        return part_of_heads(self, len(self.heavy), first, count, {"heavy": 1})

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        """Labels [B, Hkv, N, r], in the keys' dtype."""
        return self._rounded(self._taken(k))

    def encode_query(self, q: Tensor) -> Tensor:
        """The same of queries, [B, Hq, T, r]."""
        return self._rounded(self._taken(q))

    def _rounded(self, labels: Tensor) -> Tensor:
        if self.label_bits is None:
            return labels
        least, largest = labels.float().aminmax(dim=-1, keepdim=True)
        step = (largest - least) / _STEPS
        level = ((labels.float() - least) / step.clamp(min=torch.finfo(torch.float32).tiny)).round()
        return (least + level * step).to(labels.dtype)

    def _taken(self, x: Tensor) -> Tensor:
        self.check_fitted()
        channels = self.heavy.repeat_interleave(x.shape[1] // len(self.heavy), 0)
        return x.gather(-1, channels[None, :, None].expand(len(x), -1, x.shape[2], -1))

    @lasting
    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        if prefix + "heavy" in state_dict:  # its shape is known only once fitted
            self.heavy = torch.empty_like(state_dict[prefix + "heavy"], device=self.heavy.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.fits += 1

    def extra_repr(self) -> str:
        return f"channels={self.channels}, label_bits={self.label_bits}, fitted={self.fitted}"
