"""Whether what a cache's state holds for selectors that look back is whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hashattn.core.checks import check_int

_TENSORS = (
    "votes",
    "votes_left_out",
    "votes_marks",
    "votes_at_marks",
    "votes_prompts",
    "votes_queries",
    "votes_columns",
)
_NUMBERS = "votes_known", "votes_wanted", "votes_scale"
VOTES = frozenset((*_TENSORS, *_NUMBERS))
_TOGETHER = (  # all or none of each
    ("votes", "votes_left_out"),
    ("votes_marks", "votes_at_marks"),
    ("votes_queries", "votes_columns", *_NUMBERS),
)


def check_attention_sums(state: Mapping[str, Any], batch: int, kv_heads: int, head_dim: int, columns: int) -> None:
    """Raise unless the votes, marks, prompts and queries in a state are those of a cache of so many columns.

    Raises:
        TypeError: a field of another type.
        ValueError: a field that is missing, or does not fit the others.
    """
    for name in VOTES & state.keys():
        if name in _TENSORS and not isinstance(state[name], Tensor):
            raise TypeError(f"{name} in state must be a tensor, got {type(state[name]).__name__}")
    for names in _TOGETHER:
        if missing := [name for name in names if name not in state and any(other in state for other in names)]:
            raise ValueError(f"state lacks {', '.join(missing)}, which belong to {', '.join(names)}")
    if "votes" in state:
        held = _columns("votes", state["votes"], (batch, kv_heads), columns, torch.float32)
        _columns("votes_left_out", state["votes_left_out"], (batch, kv_heads), held, torch.int32, least=held)
    if "votes_marks" in state:
        marks = _table("votes_marks", state["votes_marks"], 2)
        at = state["votes_at_marks"]
        wide = sum(marks[1])
        if any(not 0 <= column <= columns for column in marks[0]) or any(not 0 <= n <= columns for n in marks[1]):
            raise ValueError(f"votes_marks in state must be of columns up to {columns}, got {marks}")
        _columns("votes_at_marks", at, (batch, kv_heads), wide, torch.float32, least=wide)
    if "votes_prompts" in state:
        if state["votes_prompts"].ndim != 2 or state["votes_prompts"].shape[1] != 3:
            raise ValueError(f"votes_prompts in state must be [n, 3], got {[*state['votes_prompts'].shape]}")
        for begin, end, _ in state["votes_prompts"].tolist():
            if not 0 <= begin < end <= columns:
                raise ValueError(f"votes_prompts in state must be spans of {columns} columns, got {begin} to {end}")
    if "votes_queries" in state:
        _check_queries(state, batch, kv_heads, head_dim, columns)


def _check_queries(state: Mapping[str, Any], batch: int, kv_heads: int, head_dim: int, columns: int) -> None:
    q, rows = state["votes_queries"], _table("votes_columns", state["votes_columns"], 3)
    if q.ndim != 4 or q.shape[0] != batch or q.shape[1] % kv_heads or q.shape[2] == 0 or q.shape[3] != head_dim:
        raise ValueError(f"votes_queries in state must be [{batch}, Hq, n, {head_dim}], got {[*q.shape]}")
    at, ends, _ = rows
    if len(at) != q.shape[2] or sorted(set(at)) != at or at[0] < 0 or at[-1] >= columns:
        raise ValueError(f"votes_columns in state must be {q.shape[2]} ascending columns below {columns}, got {at}")
    if any(not 0 <= end <= columns for end in ends):
        raise ValueError(f"votes_columns in state must say how many of {columns} columns were seen, got {ends}")
    for name in ("votes_known", "votes_wanted"):
        check_int(f"{name} in state", state[name], 0)
    if not isinstance(state["votes_scale"], float):
        raise TypeError(f"votes_scale in state must be a number, got {state['votes_scale']!r}")


def _columns(name: str, x: Tensor, rows: tuple[int, int], most: int, dtype: torch.dtype, *, least: int = 1) -> int:
    """The columns of x [*rows, n]."""
    if x.ndim != 3 or x.shape[:2] != rows or not least <= x.shape[2] <= most or x.dtype != dtype:
        raise ValueError(f"{name} in state must be {dtype} [B, Hkv, {least} to {most}], got {x.dtype} {[*x.shape]}")
    if x.is_floating_point() and bool(x.isnan().any()):
        raise ValueError(f"{name} in state must be numbers, got NaN")
    return x.shape[2]


def _table(name: str, x: Tensor, rows: int) -> list[list[int]]:
    if x.ndim != 2 or x.shape[0] != rows or x.dtype != torch.int64:
        raise ValueError(f"{name} in state must be int64 [{rows}, n], got {x.dtype} {[*x.shape]}")
    return x.tolist()
