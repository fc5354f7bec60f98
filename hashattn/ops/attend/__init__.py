"""Gathering selected keys and values, and attending to them."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.attend import cpu, reference
from hashattn.ops.attend.reference import Parts

__all__ = ["Parts", "logits", "row_numbers", "weigh"]


def row_numbers(ids: Tensor, heads: int, room: int) -> Tensor:
    """Where columns lie in storage seen as rows; see :func:`reference.row_numbers`."""
    return (cpu if ids.device.type == "cpu" else reference).row_numbers(ids, heads, room)


def logits(
    q: Tensor, keys: Tensor, ids: Tensor, scale: float, *, rows: Tensor | None = None, host: bool = False
) -> Tensor:
    """Logits of the selected keys; see :func:`reference.logits`. host: by numpy, tensors on the CPU."""
    return (cpu if host else reference).logits(q, keys, ids, scale, rows)


def weigh(
    logits: Tensor, values: Tensor, ids: Tensor, dtype: torch.dtype, *, log_weights: Tensor | None = None,
    rows: Tensor | None = None, need_lse: bool = False, need_weights: bool = False, host: bool = False,
) -> Parts:  # fmt: skip
    """Softmax of logits over the selected values; see :func:`reference.weigh`. host: by numpy, tensors on the CPU."""
    return (cpu if host else reference).weigh(
        logits, values, ids, dtype, log_weights=log_weights, rows=rows, need_lse=need_lse, need_weights=need_weights
    )
