"""Specification of what precedes a fused step: the newest queries and keys are encoded, and what keys need appended."""

from __future__ import annotations

from torch import Tensor

from hashattn.ops.decode.estimate import key_norms
from hashattn.ops.decode.inputs import Newest, Placed, Stored
from hashattn.ops.decode.maps import Map
from hashattn.ops.hamming import query_planes


def append(k: Tensor, v: Tensor, codes: Tensor, norms: Tensor | None, stored: Stored) -> None:
    """Append n columns, and add n to the length. Columns beyond the room are dropped.

    Args:
        k, v: [B, Hkv, n, D]; codes: int64 [B, Hkv, n, W].
        norms: bfloat16 [B, Hkv, n, 1]; None where none are stored.
    """
    first, n = int(stored.length), k.shape[2]
    stored.length.add_(n)
    end = min(first + n, stored.keys.shape[2], stored.codes.shape[2])
    if first < end:
        pairs = (k, stored.keys), (v, stored.values), (codes, stored.codes), (norms, stored.norms)
        for new, held in pairs:
            if new is not None and held is not None:
                held[:, :, first:end] = new[:, :, : end - first]


def encode(x: Newest, first: int | None = None) -> Tensor:
    """Encode queries and new keys, append keys, values, codes and norms, and add T to the length.

    Args:
        first: filled columns, where the host knows them: the length then need not.

    Returns:
        int64 [B, Hq, T, query_bits, W], the packed queries.
    """
    if first is not None:
        x.stored.length.fill_(first)
    query = query_planes(x.maps[0](x.q.float()), x.query_bits)
    codes = query_planes(x.maps[1](x.k.float() - x.centre.unsqueeze(2)), 1)
    append(x.k, x.v, codes, key_norms(x.k, x.centre) if x.stored.norms is not None else None, x.stored)
    return query if query.ndim == 5 else query.unsqueeze(3)


def encode_many(k: Tensor, centre: Tensor | None, by: Map, norms: bool) -> tuple[Tensor, Tensor | None]:
    """Codes of keys [B, Hkv, n, D], any view, and their norms if these are asked for, as a cache keeps both.

    Args:
        centre: float32 [B, Hkv, D], contiguous, subtracted first; None for zero.
        by: a map that :func:`hashattn.ops.decode.encodes_many` lets pass.

    Returns:
        int64 [B, Hkv, n, W]; bfloat16 [B, Hkv, n, 1] or None.
    """
    centred = k.float() if centre is None else k.float() - centre.unsqueeze(2)
    return query_planes(by(centred), 1), key_norms(k, centre) if norms else None


def encode_placed(x: Placed, q: Tensor, first: int, new: bool) -> Tensor:
    """Encode queries [B, Hq, T, D] of the columns from `first` on, which the length then ends with.

    Args:
        new: also write codes and norms of the keys of these columns.

    Returns:
        x.query, the packed queries.
    """
    stored, end = x.stored, first + q.shape[2]
    stored.length.fill_(end)
    if new:
        k = stored.keys[:, :, first:end]
        stored.codes[:, :, first:end] = query_planes(x.maps[1](k.float() - x.centre.unsqueeze(2)), 1)
        if stored.norms is not None:
            stored.norms[:, :, first:end] = key_norms(k, x.centre)
    return x.query.copy_(query_planes(x.maps[0](q.float()), x.query_bits).view_as(x.query))
