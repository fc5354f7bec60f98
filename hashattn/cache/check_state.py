"""Whether a cache's state is whole, and of the composition that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hashattn.cache.check_attention_sums import VOTES, check_attention_sums

_NEEDED = "keys", "values", "start"
_KNOWN = {*_NEEDED, "codes", "ready", "norms", "centre", *VOTES}
_FARTHEST = 2**31 - 1  # columns are int32


class Shape(NamedTuple):
    """What a state must be of; warmup: keys that a row needs before it has a centre, 0 where it asks for none."""

    batch: int
    kv_heads: int
    head_dim: int
    warmup: int


def check_state(state: Mapping[str, Any], shape: Shape) -> None:
    """Raise unless an empty cache can take over such a state: every field whole, and of its composition.

    Raises:
        TypeError: not a mapping, or a field of another type.
        ValueError: a field that is missing or unknown, or does not fit the others or the shape.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict() returned, got {type(state).__name__}")
    if missing := [name for name in _NEEDED if name not in state]:
        raise ValueError(f"state lacks {', '.join(missing)}: it is no state_dict() of a cache")
    if unknown := [str(name) for name in state if name not in _KNOWN]:
        raise ValueError(f"state holds {', '.join(unknown)}, which no cache knows of")
    keys = state["keys"]
    for name, value in state.items():
        if name not in VOTES and not isinstance(value, Tensor):
            raise TypeError(f"{name} in state must be a tensor, got {type(value).__name__}")
        if name in ("values", "codes", "norms", "centre", "votes") and value.device != keys.device:
            raise ValueError(f"{name} in state must be on the device of keys, {keys.device}, got {value.device}")
    if keys.ndim != 4:
        raise ValueError(f"keys in state must be [B, Hkv, N, D], got {[*keys.shape]}")
    batch, heads, columns = shape.batch, shape.kv_heads, keys.shape[2]
    start = state["start"]
    _expect("start", start, (batch,), torch.int64, torch.int32)
    if int(start.min()) < 0 or int(start.max()) > _FARTHEST:
        raise ValueError(f"start in state must be from 0 to {_FARTHEST}, got {start.tolist()}")
    _check_ready(state, shape)
    held = 0
    if "codes" in state:
        codes = state["codes"]
        if "ready" not in state:
            raise ValueError("state holds codes, but not ready, which says of which rows")
        if codes.ndim != 4 or not 1 <= codes.shape[2] <= columns:
            raise ValueError(f"codes in state must be [B, heads, n, W] of 1 to {columns} keys, got {[*codes.shape]}")
        held = codes.shape[2]
    if "norms" in state:
        if not held:
            raise ValueError("state holds norms, but no codes that they stand beside")
        _expect("norms", state["norms"], (batch, heads, held, 1), torch.bfloat16, torch.float16)
    check_attention_sums(state, batch, heads, shape.head_dim, columns)


def _check_ready(state: Mapping[str, Any], shape: Shape) -> None:
    """Raise ValueError unless rows and their centres fit a cache whose rows are not yet ready."""
    if "ready" not in state:
        if "centre" in state:
            raise ValueError("state holds a centre, but not ready, which says of which rows")
        return
    _expect("ready", state["ready"], (shape.batch,), torch.bool)
    for row, (ready, first) in enumerate(zip(state["ready"].tolist(), state["start"].tolist(), strict=True)):
        visible = state["keys"].shape[2] - first
        if ready and shape.warmup > max(0, visible):
            raise ValueError(
                f"ready in state says that row {row} has a centre, but of its {max(0, visible)} keys none can be "
                f"made: {shape.warmup} are needed"
            )
        if not ready and not shape.warmup:
            raise ValueError(
                f"ready in state says that row {row} waits for a centre, which this encoder does not ask for"
            )
    if ("centre" in state) != (shape.warmup > 0):
        asked = "asks for one" if shape.warmup else "does not ask for"
        raise ValueError(
            f"state {'lacks a' if shape.warmup else 'holds a'} centre, which this composition's encoder {asked}"
        )
    if "centre" in state:
        _expect("centre", state["centre"], (shape.batch, shape.kv_heads, shape.head_dim), torch.float32)


def _expect(name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if x.shape != shape or x.dtype not in dtypes:
        raise ValueError(f"{name} in state must be {dtypes[0]} of shape {[*shape]}, got {x.dtype} of {[*x.shape]}")
