"""Attention of few queries to a long cache: programs share out the keys of a head, which all rows of a group read once.

A row is a query of a KV head: there are G * T.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattn.ops.decode.device import check_nvidia, on

LOG2E = tl.constexpr(1.4426950408889634)
RESIDENT = 2  # programs of a multiprocessor at a time
NUMBERS = ["filled", "room", "kv_heads", "T", "rows"]  # for no kind of which a kernel is compiled anew
WASTE = 0.1  # share of a last round's programs that may be missing


@triton.jit(do_not_specialize=["count", "tokens", "room"])
def append_columns(k, v, keys, values, length, count, tokens, room, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Grid (count). Rows k, v [count, DIM] of B * Hkv heads become the next columns; what does not fit is dropped."""
    row, dims = tl.program_id(0), tl.arange(0, WIDTH)
    column = tl.load(length) + row % tokens
    inside = dims < DIM
    to = ((row // tokens).to(tl.int64) * room + column) * DIM + dims
    at = row.to(tl.int64) * DIM + dims
    fits = inside & (column < room)
    tl.store(keys + to, tl.load(k + at, mask=inside), mask=fits)
    tl.store(values + to, tl.load(v + at, mask=inside), mask=fits)


@triton.jit(do_not_specialize=NUMBERS)
def attend_splits(
    q, keys, values, starts, length, parts, stats, scale, filled, room, of_row, of_head, kv_heads, T, rows,
    PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (splits, rows / PADDED, B * Hkv).

    Args:
        q: [B, Hkv, rows, DIM].
        keys, values: of_row and of_head elements apart from batch row to batch row and from head to head.
        starts, length: int32 [B] and [1]; None for zeros, and for the number that is given as filled.
        parts, stats: float32 [B * Hkv, splits, rows, WIDTH] and [.., 2], written: a row's sum, not yet divided; its
            peak (base 2) and total.
    """
    split, splits, head = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    first = 0
    if starts is not None:
        first = tl.load(starts + head // kv_heads)
    if length is not None:
        filled = tl.load(length)
    end = tl.minimum(filled, room)
    own = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), splits), TILE) * TILE
    low = first + split * own
    high = tl.minimum(low + own, end)
    mine, dims, tile = tl.program_id(1) * PADDED + tl.arange(0, PADDED), tl.arange(0, WIDTH), tl.arange(0, TILE)
    inside = (dims < DIM)[None, :]
    at = (head.to(tl.int64) * rows + mine)[:, None] * DIM + dims[None, :]
    query = tl.load(q + at, mask=(mine < rows)[:, None] & inside, other=0.0)
    ends = filled - T + 1 + mine % T
    from_head = (head // kv_heads).to(tl.int64) * of_row + (head % kv_heads).to(tl.int64) * of_head
    peak = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, WIDTH], tl.float32)
    for column in range(low, high, TILE):
        columns = column + tile
        there = (columns < high)[:, None] & inside
        to = from_head + columns.to(tl.int64)[:, None] * DIM + dims[None, :]
        k = tl.load(keys + to, mask=there, other=0.0)
        v = tl.load(values + to, mask=there, other=0.0)
        x = tl.dot(query, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        x = tl.where((columns < high)[None, :] & (columns[None, :] < ends[:, None]), x, float("-inf"))
        higher = tl.maximum(peak, tl.max(x, 1))  # which passes NaN over: it is then in the total
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(x - base[:, None])
        shrunk = tl.exp2(peak - base)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = higher
    part = (head.to(tl.int64) * splits + split) * rows + mine
    tl.store(parts + part[:, None] * WIDTH + dims[None, :], acc, mask=(mine < rows)[:, None])
    tl.store(stats + part * 2, peak, mask=mine < rows)
    tl.store(stats + part * 2 + 1, total, mask=mine < rows)


@triton.jit(do_not_specialize=["room", "splits", "rows"])
def combine_splits(
    parts, stats, length, out, room, splits, rows, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """Grid (B * Hkv * rows): join a row's parts. It is NaN where length is beyond the room, and zeros without keys."""
    row, dims, pieces = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, TILE)
    first = (row // rows).to(tl.int64) * splits * rows + row % rows
    peak = tl.full([TILE], float("-inf"), tl.float32)
    for i in range(0, splits, TILE):
        at = first + (i + pieces).to(tl.int64) * rows
        peak = tl.maximum(peak, tl.load(stats + at * 2, mask=i + pieces < splits, other=float("-inf")))
    highest = tl.max(peak, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for i in range(0, splits, TILE):
        there = i + pieces < splits
        at = first + (i + pieces).to(tl.int64) * rows
        weight = tl.exp2(tl.load(stats + at * 2, mask=there, other=float("-inf")) - base)
        total += weight * tl.load(stats + at * 2 + 1, mask=there, other=0.0)
        own = tl.load(parts + at[:, None] * WIDTH + dims[None, :], mask=there[:, None], other=0.0)
        acc += tl.sum(own * weight[:, None], 0)
    whole = tl.sum(total, 0)
    result = acc / tl.where(whole == 0, 1.0, whole)
    if length is not None:
        result = tl.where(tl.load(length) > room, float("nan"), result)
    at = row.to(tl.int64) * DIM + dims
    tl.store(out + at, result.to(out.dtype.element_ty), mask=dims < DIM)


def append(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    """See :func:`hashattn.ops.dense.reference.append`; keys and values are contiguous."""
    check_nvidia(k.device)
    (batch, heads, tokens, dim), k, v = k.shape, k.contiguous(), v.contiguous()
    count, room = batch * heads * tokens, keys.shape[2]
    with on(k.device):
        append_columns[(count,)](
            k, v, keys, values, length, count, tokens, room, DIM=dim, WIDTH=triton.next_power_of_2(dim), num_warps=1
        )
    length.add_(tokens)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, length: Tensor | None, scale: float
) -> Tensor:
    """See :func:`hashattn.ops.dense.reference.attend`.

    Args:
        keys, values: of the same strides, rows of D numbers without gaps.
        starts, length: None for rows that begin at column 0, and for keys all of which are filled.
    """
    check_nvidia(q.device)
    q = q.contiguous()
    (batch, q_heads, tokens, dim), (kv_heads, room) = q.shape, keys.shape[1:3]
    rows, width = q_heads // kv_heads * tokens, triton.next_power_of_2(dim)
    padded, tile = blocks(rows, width, q.element_size())
    tiles, heads = triton.cdiv(rows, padded), batch * kv_heads
    splits = splits_of(heads * tiles, triton.cdiv(room, 2 * tile), q.device)
    parts = q.new_empty((heads, splits, rows, width), dtype=torch.float32)
    stats, out = parts.new_empty((heads, splits, rows, 2)), torch.empty_like(q)
    given, apart = (q, keys, values, starts, length, parts, stats, scale), (keys.stride(0), keys.stride(1))
    constants = {"DIM": dim, "WIDTH": width}
    blocked = {"PADDED": padded, "TILE": tile, "num_warps": 4, "num_stages": 3}
    with on(q.device):
        attend_splits[(splits, tiles, heads)](
            *given, room, room, *apart, kv_heads, tokens, rows, **constants, **blocked
        )
        joined = min(64, triton.next_power_of_2(splits))
        combine_splits[(heads * rows,)](
            parts, stats, length, out, room, splits, rows, TILE=joined, **constants, num_warps=4
        )
    return out


def blocks(rows: int, width: int, itemsize: int) -> tuple[int, int]:
    """Rows and keys of a program's products: what RESIDENT programs of three stages have room for."""
    return min(64, max(16, triton.next_power_of_2(rows))), max(16, 16384 // (width * itemsize))


def splits_of(programs: int, most: int, device: torch.device) -> int:
    """Into how many parts the keys of a head are split, so that all rounds of a GPU's programs are nearly full."""
    at_once = RESIDENT * multiprocessors(device)
    if programs <= at_once:
        return max(1, min(most, at_once // programs))
    for splits in range(1, 9):
        rounds = programs * splits / at_once
        if triton.cdiv(programs * splits, at_once) - rounds <= WASTE * rounds:
            return min(most, splits)
    return 1


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
