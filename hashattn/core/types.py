"""What the stages hand to each other. B batch, Hq query heads, Hkv KV heads, T queries, N keys, K slots, W words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hashattn.core.collisions import Collisions

CRITICAL, MEDIUM, SAMPLED = 0, 1, 2
Table = Sequence[Sequence[Sequence[int]]]  # [B][T], some numbers for each query


@dataclass(frozen=True, eq=False)
class Selection:
    """The keys that each query keeps.

    Attributes:
        ids: int32 [B, Hq or Hkv, T, K], columns of the cache, -1 in empty slots, no key twice in a row.
        tier: int8, the shape of ids: 0 critical (exact logit), 1 medium (logit estimated from the codes), 2 sampled
            (exact logit; stands for keys that were not drawn). None means that every slot is critical.
        critical_slots: no slot from this one on is critical, which saves reading its key; None if not known.
        log_weights: float32, the shape of ids, added to the logits; None means zero.
        collisions: how the keys of sampled slots were found, if their weights are for the attend stage to make.
        filled: how many slots are, over rows, heads and queries, where that is known without counting.
    """

    ids: Tensor
    tier: Tensor | None = None
    log_weights: Tensor | None = None
    critical_slots: int | None = None
    collisions: Collisions | None = None
    filled: int | None = None

    @property
    def count(self) -> Tensor:
        """Filled slots, int64 [B, heads, T]."""
        return (self.ids >= 0).sum(-1)


@dataclass(frozen=True, eq=False)
class Output:
    """What an attend stage returns.

    Attributes:
        out: [B, Hq, T, D], the dtype of the queries; zero where a query kept no key.
        lse: float32 [B, Hq, T], log-sum-exp of the kept logits (-inf where none), on request: with it parts merge.
        weights: float32 [B, Hq, T, K], softmax weights over the selection's slots, on request.
        tail: float32 [B, Hq, T], the share of the attention that sampled keys stand for, from SampledAttend on request.
        error: float32 [B, Hq, T], standard error of out, a 2-norm over D, likewise.
    """

    out: Tensor
    lse: Tensor | None = None
    weights: Tensor | None = None
    tail: Tensor | None = None
    error: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """Where a call stands in a model.

    Attributes:
        layer: number of the layer.
        previous: the Selection of the layer before, in the same forward pass; None if that layer ran dense.
        previous_weights: its softmax weights, float32 [B, Hq, T, K].
    """

    layer: int = 0
    previous: Selection | None = None
    previous_weights: Tensor | None = None
