"""Appends keys, values and codes at a length that only the device knows, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def append_rows(
    k, v, codes, keys, values, stored, length, n, room, code_room, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Grid (n, B * Hkv). k, v [B, Hkv, n, DIM] and codes [B, Hkv, n, WORDS] become the last n of `length` columns."""
    i, head = tl.program_id(0), tl.program_id(1)
    column = tl.load(length) - n + i
    fits = (column < room) & (column < code_room)  # what does not fit is dropped
    source = head.to(tl.int64) * n + i
    dims, words = tl.arange(0, WIDTH), tl.arange(0, WORDS)
    inside = dims < DIM
    to = (head.to(tl.int64) * room + column) * DIM + dims
    tl.store(keys + to, tl.load(k + source * DIM + dims, mask=inside, other=0.0), mask=inside & fits)
    tl.store(values + to, tl.load(v + source * DIM + dims, mask=inside, other=0.0), mask=inside & fits)
    code = tl.load(codes + source * WORDS + words)
    tl.store(stored + (head.to(tl.int64) * code_room + column) * WORDS + words, code, mask=fits)


def append(
    k: Tensor, v: Tensor, codes: Tensor, keys: Tensor, values: Tensor, stored: Tensor, length: Tensor
) -> None:  # fmt: skip
    """Append n columns, and add n to length.

    Args:
        k, v: [B, Hkv, n, D]; codes: int64 [B, Hkv, n, W], W a power of 2.
        keys, values, stored: what they are appended to, [B, Hkv, room, X], contiguous. Columns beyond are dropped.
        length: int32 [1], filled columns.
    """
    batch, heads, n, dim = k.shape
    length.add_(n)
    append_rows[(n, batch * heads)](
        k.contiguous(), v.contiguous(), codes.contiguous(), keys, values, stored, length, n, keys.shape[2],
        stored.shape[2], DIM=dim, WIDTH=triton.next_power_of_2(dim), WORDS=codes.shape[3], num_warps=1,
    )  # fmt: skip
