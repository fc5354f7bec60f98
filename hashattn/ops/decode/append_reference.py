"""Specification of what precedes a fused step: the newest queries and keys are encoded, keys and codes appended."""

from __future__ import annotations

from torch import Tensor

from hashattn.ops.hamming import query_planes


def append(
    k: Tensor, v: Tensor, codes: Tensor, keys: Tensor, values: Tensor, stored: Tensor, length: Tensor
) -> None:  # fmt: skip
    """Append n columns, and add n to length.

    Args:
        k, v: [B, Hkv, n, D]; codes: int64 [B, Hkv, n, W].
        keys, values, stored: what they are appended to, [B, Hkv, room, X]. Columns beyond the smallest are dropped.
        length: int32 [1], filled columns.
    """
    first, n = int(length), k.shape[2]
    length.add_(n)
    end = min(first + n, keys.shape[2], stored.shape[2])
    if first < end:
        for new, held in ((k, keys), (v, values), (codes, stored)):
            held[:, :, first:end] = new[:, :, : end - first]


def encode(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, planes: tuple[Tensor, Tensor], query_bits: int,
    keys: Tensor, values: Tensor, codes: Tensor, length: Tensor,
) -> Tensor:  # fmt: skip
    """Encode queries and new keys by linear maps, append keys, values and codes, and add T to length.

    Args:
        q: [B, Hq, T, D]; k, v: [B, Hkv, T, D].
        centre: float32 [B, Hkv, D], subtracted from the keys first.
        planes: float32 [D, bits], of queries and of keys.
        query_bits: planes of a query.
        keys, values, codes, length: as in append.

    Returns:
        int64 [B, Hq, T, query_bits, W], the packed queries.
    """
    query = query_planes(q.float() @ planes[0], query_bits)
    append(k, v, query_planes((k.float() - centre.unsqueeze(2)) @ planes[1], 1), keys, values, codes, length)
    return query if query.ndim == 5 else query.unsqueeze(3)
