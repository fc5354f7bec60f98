"""Checks of what users hand in, before any work is done."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8


class NotAnInteger(TypeError, ValueError):
    """An argument that must be an integer is none. Of both kinds: what is no number of keys is no value either."""


def check_int(name: str, value: Any, least: int, most: int | None = None, *, hint: str = "") -> int:
    """An integer that a user gave, NumPy's and one-element tensors too, as an int.

    Args:
        name: of the argument.
        least, most: it must be from `least` to `most`; None for any number from `least` on.
        hint: what else the message says, in brackets.

    Raises:
        NotAnInteger: bool, float or anything else that does not count.
        ValueError: an integer out of this range.
    """
    wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
    hint = f" ({hint})" if hint else ""
    boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    try:
        number = None if boolean else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # by a tensor of floats, or of several numbers
        number = None
    if number is None:
        raise NotAnInteger(f"{name} must be an int {wanted}{hint}, got {value!r}")
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} must be an int {wanted}{hint}, got {number}")
    return number


def check_scale(scale: Any, head_dim: int) -> float:
    """What logits are multiplied with, 1 / sqrt(head_dim) if it is None, as a float; NaN and inf pass, and come out.

    Raises:
        TypeError: neither a number nor a tensor of one; a tensor that asks for a gradient, which it would not get.
    """
    if scale is None:
        return float(head_dim**-0.5)
    single = isinstance(scale, Tensor) and scale.numel() == 1 and scale.is_floating_point()
    if single and scale.requires_grad and torch.is_grad_enabled():
        single = False
    if not single and (isinstance(scale, bool) or not isinstance(scale, Real)):
        raise TypeError(f"scale must be a number, without gradients (multiply q with it for those), got {scale!r}")
    try:
        return float(scale)
    except OverflowError as e:
        raise ValueError(f"scale must fit a float, got {scale!r:.40}...") from e


def check_seed(seed: Any) -> int:
    """A seed as torch.Generator.manual_seed takes it, as an int; raises as check_int()."""
    return check_int("seed", seed, -(2**63), 2**64 - 1)


def keep_ints(part: object, **least: int) -> None:
    """Check int fields of a frozen dataclass, of at least so much each, and keep them as ints."""
    for name, low in least.items():
        object.__setattr__(part, name, check_int(name, getattr(part, name), low))


def check_number(name: str, value: Any) -> float:
    """A finite number that a user gave, NumPy's too, as a float.

    Raises:
        TypeError: bool, or anything else that is no number.
        ValueError: NaN or infinity.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a finite number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def check_float(**tensors: Tensor) -> None:
    """Raise TypeError unless all are floating-point tensors of one dtype and device."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got one of layout {x.layout}")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != first.dtype:
            raise TypeError(f"{first_name} and {name} must have one dtype, got {first.dtype} and {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{first_name} and {name} must be on one device, got {first.device} and {x.device}")


def check_kv(k: Tensor, v: Tensor, batch: int, kv_heads: int, head_dim: int) -> None:
    """Raise unless k and v are [batch, kv_heads, n >= 1, head_dim], none of which is 0."""
    check_float(k=k, v=v)
    for name, size in (("B", batch), ("Hkv", kv_heads), ("D", head_dim)):
        if size < 1:
            raise ValueError(f"k and v must be [B, Hkv, n, D] with none of these 0, got {name} = {size}")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, kv_heads, head_dim):
            raise ValueError(f"{name} must be [B, Hkv, n, D] = [{batch}, {kv_heads}, n, {head_dim}], got {[*x.shape]}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {[*k.shape]} and {[*v.shape]}")
    if k.shape[2] == 0:
        raise ValueError("k and v must hold at least one column, got 0")


def check_q(q: Tensor, batch: int, kv_heads: int, head_dim: int, keys: int) -> None:
    """Raise unless q is [batch, Hq, 1 <= T <= keys, head_dim] with Hq a multiple of kv_heads."""
    if q.ndim != 4 or (q.shape[0], q.shape[3]) != (batch, head_dim):
        raise ValueError(f"q must be [B, Hq, T, D] = [{batch}, Hq, T, {head_dim}], got {[*q.shape]}")
    if q.shape[1] == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q must have a multiple of Hkv = {kv_heads} heads, got Hq = {q.shape[1]}")
    if q.shape[2] == 0:
        raise ValueError("q must hold at least one query, got T = 0")
    if q.shape[2] > keys:
        raise ValueError(
            f"q holds T = {q.shape[2]} queries, more than the N = {keys} keys (a query is one of the keys)"
        )


def check_fit(**tensors: Tensor) -> None:
    """Raise unless all are finite floating-point [B, heads, N, D] with none of these 0.

    Raises:
        TypeError, ValueError: the message names the tensor, and says what it is.
    """
    for name, x in tensors.items():
        check_float(**{name: x})
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must hold vectors [B, heads, N, D], none of these 0, to fit to, got {[*x.shape]}")
    check_finite(**tensors)


def check_finite(**tensors: Tensor) -> None:
    """Raise ValueError naming the tensor that holds NaN or infinity, and where."""
    for name, x in tensors.items():
        finite = torch.isfinite(x)
        if not finite.all():
            where = tuple((~finite).nonzero()[0].tolist())
            raise ValueError(f"{name} must be finite, got {x[where].item()} at {where}")


def as_rows(rows: Tensor | Sequence[int] | Sequence[bool]) -> Tensor:
    """Row numbers or a mask, as they were given, as a tensor on the CPU; TypeError if they are no numbers."""
    try:
        return torch.as_tensor(rows).cpu()
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"rows must be row numbers or a mask, got {rows!r:.200}") from e


def row_index(rows: Tensor | Sequence[int] | Sequence[bool], batch: int) -> Tensor:
    """Row numbers, or a mask of rows, as int64 [n] on the CPU; for select_rows()."""
    given = as_rows(rows)
    if given.dtype == torch.bool:
        if given.shape != (batch,) or not bool(given.any()):
            raise ValueError(f"rows as a mask must be bool of shape ({batch},) that keeps one, got {given.tolist()}")
        return given.nonzero().squeeze(1)
    if given.numel() and given.dtype not in _INTEGERS:
        raise TypeError(f"rows must be row numbers or a mask, got {given.dtype}: {given.tolist()}")
    if given.ndim != 1 or len(given) == 0 or int(given.min()) < 0 or int(given.max()) >= batch:
        raise ValueError(f"rows must be row numbers from 0 to {batch - 1}, at least one, got {given.tolist()}")
    return given.long()


def row_order(rows: Tensor | Sequence[int], batch: int) -> Tensor:
    """As many row numbers as there are rows; raises TypeError or ValueError for a mask or another number of them."""
    given = as_rows(rows)
    if given.dtype == torch.bool:
        raise TypeError(f"rows must be numbers of rows, got the mask {given.tolist()}, which tells no order")
    if given.shape != (batch,):
        raise ValueError(f"rows must have shape ({batch},), got {(*given.shape,)}")
    return given


def check_start(start: Tensor, batch: int, columns: int) -> list[int]:
    """First columns of rows, int [batch], as numbers; ValueError unless each is one of so many columns or the end."""
    if not isinstance(start, Tensor) or start.shape != (batch,) or start.dtype not in _INTEGERS:
        raise ValueError(f"start must be integers of shape ({batch},), got {start!r}")
    starts: list[int] = start.tolist()
    if min(starts) < 0 or max(starts) > columns:
        raise ValueError(f"start must be from 0 to {columns}, the columns there are, got {starts}")
    return starts


def check_query(query: Any, batch: int, kv_heads: int) -> None:
    """Raise TypeError or ValueError unless encoded queries are of such rows and heads."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be what encode_query() returned, got {type(query).__name__}")
    if query.ndim < 4 or len(query) != batch or query.shape[1] == 0 or query.shape[1] % kv_heads:
        raise ValueError(
            f"query must be [B, Hq, T, ...] with B = {batch} and Hq a multiple of Hkv = {kv_heads}, got "
            f"{[*query.shape]}"
        )
