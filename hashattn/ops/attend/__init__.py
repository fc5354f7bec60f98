"""Gathering selected keys and values, and attending to them."""

from __future__ import annotations

from torch import Tensor

from hashattn.ops.attend import cpu, reference
from hashattn.ops.attend.reference import Parts, row_numbers

__all__ = ["Parts", "logits", "row_numbers", "weigh"]


def logits(q: Tensor, keys: Tensor, ids: Tensor, scale: float, *, engine: str = "reference") -> Tensor:
    """Logits of the selected keys; see :func:`reference.logits`. engine: "reference" or "cpu"."""
    return (cpu if engine == "cpu" else reference).logits(q, keys, ids, scale)


def weigh(
    logits: Tensor, values: Tensor, ids: Tensor, dtype: object, *, log_weights: Tensor | None = None,
    need_lse: bool = False, need_weights: bool = False, engine: str = "reference",
) -> Parts:  # fmt: skip
    """Softmax of logits over the selected values; see :func:`reference.weigh`. engine: "reference" or "cpu"."""
    return (cpu if engine == "cpu" else reference).weigh(
        logits, values, ids, dtype, log_weights=log_weights, need_lse=need_lse, need_weights=need_weights
    )
