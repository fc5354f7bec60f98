"""Appends keys, values, codes and norms at a length that only the device knows, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hashattn.ops.decode.device import check_nvidia, on
from hashattn.ops.decode.inputs import Stored


@triton.jit
def place(rows, count, filled, T, room, code_room):
    """Where rows [B * Hkv * T] go behind the filled columns: head and column of each, and whether it fits."""
    head, column = rows // T, filled + rows % T
    return head.to(tl.int64), column, (rows < count) & (column < room) & (column < code_room)


@triton.jit
def load_rows(new, rows, count, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows of new [count, DIM]: [rows, PADDED]."""
    dims = tl.arange(0, PADDED)[None, :]
    inside = (rows < count)[:, None] & (dims < DIM)
    return tl.load(new + rows.to(tl.int64)[:, None] * DIM + dims, mask=inside, other=0)


@triton.jit
def store_rows(x, held, to, fits, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Store those that fit as rows `to` of held [..., DIM]."""
    dims = tl.arange(0, PADDED)[None, :]
    tl.store(held + to[:, None] * DIM + dims, x, mask=fits[:, None] & (dims < DIM))


@triton.jit
def lengthen(length, arrived, to, programs):
    """The last of the programs that call this, once each has read the length, sets it."""
    tl.debug_barrier()  # all threads of this program have read it
    if tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1:
        tl.store(arrived, 0)
        tl.store(length, to)


@triton.jit
def append_rows(
    k, v, codes, new_norms, keys, values, stored, norms, length, arrived, count, T, room, code_room,
    DIM: tl.constexpr, PADDED: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (count / TILE). Rows k, v [count, DIM], codes [count, WORDS] become the next T columns of B * Hkv heads.

    So do bfloat16 new_norms [count], unless they are None.
    """
    WIDTH: tl.constexpr = triton.next_power_of_2(WORDS)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    filled = tl.load(length)
    key, value = load_rows(k, rows, count, DIM, PADDED), load_rows(v, rows, count, DIM, PADDED)
    code = load_rows(codes, rows, count, WORDS, WIDTH)
    if new_norms is not None:
        norm = load_rows(new_norms, rows, count, 1, 1)
    lengthen(length, arrived, filled + T, tl.num_programs(0))
    head, column, fits = place(rows, count, filled, T, room, code_room)
    store_rows(key, keys, head * room + column, fits, DIM, PADDED)
    store_rows(value, values, head * room + column, fits, DIM, PADDED)
    store_rows(code, stored, head * code_room + column, fits, WORDS, WIDTH)
    if new_norms is not None:
        store_rows(norm, norms, head * code_room + column, fits, 1, 1)


def append(k: Tensor, v: Tensor, codes: Tensor, norms: Tensor | None, stored: Stored, arrived: Tensor) -> None:
    """See :func:`hashattn.ops.decode.encode_reference.append`.

    Args:
        stored: contiguous.
        arrived: int32 [1], zero before and after.
    """
    check_nvidia(k.device)
    batch, heads, tokens, dim = k.shape
    count, tile = batch * heads * tokens, 4
    new = *(x.contiguous() for x in (k, v, codes)), None if norms is None else norms.contiguous()
    held = stored.keys, stored.values, stored.codes, stored.norms, stored.length, arrived
    rooms = stored.keys.shape[2], stored.codes.shape[2]
    constants = {"DIM": dim, "PADDED": triton.next_power_of_2(dim), "WORDS": codes.shape[3], "TILE": tile}
    with on(k.device):
        append_rows[(triton.cdiv(count, tile),)](*new, *held, count, tokens, *rooms, **constants, num_warps=4)
