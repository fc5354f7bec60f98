"""What a decode step is given, what it gives, and what encoding the newest queries and keys is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.rule import Rule


@dataclass(frozen=True, eq=False)
class Stored:
    """The columns of a cache, as steps read them and append to them. Columns beyond the smallest room are none.

    Attributes:
        keys, values: [B, Hkv, room, D].
        codes: int64 [B, Hkv, code_room, W]; of other families as they say.
        length: int32 [1], filled columns.
        norms: bfloat16 [B, Hkv, code_room, 1], see :class:`Estimate`; None where they are not kept.
    """

    keys: Tensor
    values: Tensor
    codes: Tensor
    length: Tensor
    norms: Tensor | None = None


class Before(NamedTuple):
    """What the layer before kept in the same step.

    Attributes:
        ids: int32 [B, H, T, K] with H = Hq or Hkv, columns, -1 in empty slots; no key twice.
        weights: float32 [B, Hq, T, K], its softmax weights.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """A decode step: attention of a few queries to the keys that their codes find nearest.

    Attributes:
        q: [B, Hq, T, D], the last T of the stored positions.
        query: int64 [B, Hq, T, P, W], P bit planes of the packed queries, the least significant first; of other
            families as they say, with five dimensions.
        stored: what is searched and attended to.
        starts: int32 [B], each row's first column.
        rule: which keys are kept.
        scale: of the logits.
        causal: each query sees the keys up to its own position; otherwise all of them.
        estimate: what logits of medium keys are estimated from, with a rule that has critical ones; None if all logits
            are exact.
        bounds: int32, Sizes.state, zeros at first, which the step rewrites for the next one like it: how far
            candidates are looked for (one that turns out wrong costs time and changes nothing), and zeros.
        scores: the family of scores that rank the keys.
        page: columns of a page that share a code, counted from a row's first one; 1 for a code a key.
        before: what the layer before kept, for a rule with a prior; None if it ran dense.
        workspace: uint8, Sizes.workspace of them at least, whatever it holds; steps on the same stream share it.
            The specification needs neither.
    """

    q: Tensor
    query: Tensor
    stored: Stored
    starts: Tensor
    rule: Rule
    scale: float
    causal: bool = True
    estimate: Estimate | None = None
    bounds: Tensor | None = None
    workspace: Tensor | None = None
    scores: str = "hamming"
    page: int = 1
    before: Before | None = None


class Outputs(NamedTuple):
    """What a step gives.

    Attributes:
        out: [B, Hq, T, D], zero where a query keeps no key, NaN where length is beyond the room.
        lse: float32 [B, Hq, T].
        ids: int32 [B, H, T, slots] with H = Hkv where the rule is shared: columns in ascending order, -1 in empty
            slots. A rule with chunks gives each chunk its slots, one chunk after the other.
        tier: int8, the shape of ids: 1 for medium keys, 0 for critical ones and empty slots; None without an estimate.
        weights: float32 [B, Hq, T, slots], softmax weights, for the prior of the layer after; None for a rule without.
    """

    out: Tensor
    lse: Tensor
    ids: Tensor
    tier: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Newest:
    """The newest queries, keys and values, which are encoded, and appended to what is stored.

    Attributes:
        q: [B, Hq, T, D]; k, v: [B, Hkv, T, D].
        centre: float32 [B, Hkv, D], contiguous, subtracted from the keys first.
        maps: of queries and of keys, which :func:`hashattn.ops.decode.maps.why_not` lets pass; only the first scales.
        query_bits: planes of a query.
        stored: contiguous; T is added to its length. Norms |k - centre| are appended where it has any.
        arrived: int32, as many as :func:`hashattn.ops.decode.sizes.counters` says, zeros before and after.
        scores: the family of scores that rank the keys.
        workspace: uint8, Sizes.workspace of them at least, whatever it holds. The specification needs neither.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    centre: Tensor
    maps: tuple[Map, Map]
    query_bits: int
    stored: Stored
    arrived: Tensor | None = None
    workspace: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Placed:
    """The newest queries and the columns of the same positions, whose keys and values are stored and have no code yet.

    Attributes:
        q, maps, query_bits, arrived, workspace: as in :class:`Newest`.
        centre: float32 [B, Hkv, D], contiguous, subtracted from the keys first.
        stored: contiguous; codes and norms are written, and the length is set.
        query: int64 [B, Hq, T, query_bits, W], contiguous, where the packed queries are written.
    """

    q: Tensor
    centre: Tensor
    maps: tuple[Map, Map]
    query_bits: int
    stored: Stored
    query: Tensor
    arrived: Tensor | None = None
    workspace: Tensor | None = None
