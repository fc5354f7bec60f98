"""What an encoder is, and the checks that binary ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hashattn.core.checks import check_int
from hashattn.encoders.centring import Centring
from hashattn.ops.decode import Map
from hashattn.ops.hamming import query_planes, words

__all__ = ["Encoder", "check_bits", "key_bits", "query_planes", "subtract"]


class Encoder(ABC):
    """Turns post-RoPE keys and queries into what an index stores and scores.

    Attributes:
        code: "binary" (packed sign bits), "pq" (numbers of centroids) or "vector" (floats); an index says which it
            accepts.
        bits: length of a binary code; 0 for vectors.
        query_bits: bit planes of a query.
        angular: whether the Hamming distance of binary codes estimates the angle between a query and a centred key.
        biased: whether the last byte of a key's code is a number that is added to its distance.
        fits: how often it was fitted or loaded; caches encode anew when it changes.
        centring: if given, the cache freezes such a centre per row and KV head and hands it to encode_key.
    """

    code: str = "binary"
    bits: int = 0
    query_bits: int = 1
    angular: bool = True
    biased: bool = False
    centring: Centring | None = None
    fits: int = 0

    @abstractmethod
    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        """Codes of keys [B, Hkv, N, D], minus centre [B, Hkv, D] if given: int64 [B, heads, N, W]."""

    @abstractmethod
    def encode_query(self, q: Tensor) -> Tensor:
        """Queries [B, Hq, T, D] as their index scores them: int64 [B, Hq, T, W], or planes [B, Hq, T, b, W]."""

    @property
    def fitted_centre(self) -> Tensor | None:
        """What fit() found to subtract from every row's keys, [Hkv, D]; None where rows have centres of their own."""
        return None

    def centre_of(self, k: Tensor) -> Tensor | None:
        """What a cache subtracts from rows of keys [B, Hkv, N, D] from their start on: [B, Hkv, D]; None for zero."""
        if self.fitted_centre is not None:
            return self.fitted_centre.expand(len(k), -1, -1)
        return None if self.centring is None else self.centring.centre(k)

    def for_heads(self, first: int, count: int) -> Encoder:
        """The encoder for `count` of the KV heads from `first` on and their query heads, as tensor parallelism asks.

        One that serves every head returns itself; one that was fitted shares memory with its part.

        Raises:
            ValueError: heads that it was not fitted to.
        """
        return self

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of a key's code, for keys of head_dim numbers of itemsize bytes."""
        return 8 * -(-self.bits // 64) if self.code == "binary" else head_dim * itemsize

    def query_shape(self, head_dim: int) -> tuple[int, int]:
        """Last two dimensions of a query as its index packs it for fused steps: planes and words, or 1 and numbers."""
        return (self.query_bits, words(self.bits)) if self.code == "binary" else (1, head_dim)

    def code_heads(self, kv_heads: int) -> int:
        """Heads of the key codes for a model of this many KV heads."""
        return kv_heads

    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Widths of the hidden layers of the queries' and the keys' map, () where it is linear.

        None unless binary codes are signs of such maps, which all heads share.
        """
        return None

    def maps(self, head_dim: int, device: torch.device) -> tuple[Map, Map]:
        """These maps, of queries and of keys, for kernels to multiply with; they share memory with the weights.

        Raises:
            TypeError: there are none (widths() is None).
        """
        raise TypeError(f"{type(self).__name__} has no maps that all heads share")

    def layer(self, i: int) -> Encoder:
        """The encoder of layer i of a model; encoders that serve every layer return themselves."""
        return self

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:  # noqa: B027 (nothing to check is fine)
        """Raise ValueError if heads of this number and size cannot be encoded."""

    def prepare(self, kv_heads: int, head_dim: int, device: torch.device) -> None:  # noqa: B027 (most have none to make)
        """Make room on a device for the weights that are only shaped by fit(), as loading fills them."""

    def warn_unfitted(self) -> None:  # noqa: B027 (most need no fit)
        """Warn, once, if it is not fitted and encodes all the same: as encode_key() does, and who encodes instead."""

    def check_fitted(self) -> None:
        """Raise RuntimeError if it is not fitted; one that encodes all the same, and warns, lets that pass."""
        if not getattr(self, "fitted", True):
            raise RuntimeError(
                f"this {type(self).__name__} is not fitted: call fit(q, k) with the model's keys, load its state_dict, "
                "or give the preset pretrained=..., which `hashattn fit --preset` makes"
            )


def check_bits(bits: int, query_bits: int = 1, most: int = 1024) -> tuple[int, int]:
    """Both as ints; raises, as check_int(), unless 8 <= bits <= most and query_bits is 1, 2, 4 or 8."""
    bits, planes = check_int("bits", bits, 8, most), check_int("query_bits", query_bits, 1, 8)
    if planes not in (1, 2, 4, 8):
        raise ValueError(f"query_bits must be 1, 2, 4 or 8, got {query_bits!r}")
    return bits, planes


def subtract(k: Tensor, centre: Tensor | None) -> Tensor:
    """Keys [B, H, N, D] as float32, minus a centre [B, H, D] if there is one."""
    return k.float() if centre is None else k.float() - centre.float().unsqueeze(2)


def key_bits(projection: Tensor) -> Tensor:
    """Pack the signs of [B, H, N, bits]; zero counts as positive."""
    return query_planes(projection, 1)
