"""Specification of what precedes a fused step: the newest queries and keys are encoded, and what keys need appended."""

from __future__ import annotations

from torch import Tensor

from hashattn.ops.decode.estimate import key_norms
from hashattn.ops.decode.maps import Map
from hashattn.ops.hamming import query_planes


def append(
    k: Tensor, v: Tensor, codes: Tensor, keys: Tensor, values: Tensor, stored: Tensor, length: Tensor,
    new_norms: Tensor | None = None, norms: Tensor | None = None,
) -> None:  # fmt: skip
    """Append n columns, and add n to length.

    Args:
        k, v: [B, Hkv, n, D]; codes: int64 [B, Hkv, n, W].
        keys, values, stored: what they are appended to, [B, Hkv, room, X]. Columns beyond the smallest are dropped.
        length: int32 [1], filled columns.
        new_norms, norms: bfloat16 [B, Hkv, n, 1], and what they are appended to, of the codes' room; None for neither.
    """
    first, n = int(length), k.shape[2]
    length.add_(n)
    end = min(first + n, keys.shape[2], stored.shape[2])
    if first < end:
        for new, held in ((k, keys), (v, values), (codes, stored), (new_norms, norms)):
            if new is not None and held is not None:
                held[:, :, first:end] = new[:, :, : end - first]


def encode(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, maps: tuple[Map, Map], query_bits: int, keys: Tensor,
    values: Tensor, codes: Tensor, length: Tensor, norms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Encode queries and new keys, append keys, values, codes and norms, and add T to length.

    Args:
        q: [B, Hq, T, D]; k, v: [B, Hkv, T, D].
        centre: float32 [B, Hkv, D], subtracted from the keys first.
        maps: of queries and of keys, which :func:`hashattn.ops.decode.maps.why_not` lets pass.
        query_bits: planes of a query.
        keys, values, codes, length: as in append.
        norms: what |k - centre| is appended to, as there; None where it is not kept.

    Returns:
        int64 [B, Hq, T, query_bits, W], the packed queries.
    """
    query = query_planes(maps[0](q.float()), query_bits)
    new_codes = query_planes(maps[1](k.float() - centre.unsqueeze(2)), 1)
    new_norms = key_norms(k, centre) if norms is not None else None
    append(k, v, new_codes, keys, values, codes, length, new_norms, norms)
    return query if query.ndim == 5 else query.unsqueeze(3)
