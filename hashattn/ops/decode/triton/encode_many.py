"""Encoding many keys at once in Triton, as after a prefill: one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattn.ops.decode.device import check_nvidia, on
from hashattn.ops.decode.estimate import NORMS
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.triton.encode import pack

KEYS = 64  # of a program
DEPTH, WARPS = 16, 8  # dimensions at a time, few and many enough that no register is spilled


@triton.jit(do_not_specialize=["count", "tiles"])
def encode_tiles(
    keys, centre, linear, codes, norms, of_row, of_head, count, tiles, HEADS: tl.constexpr, DIM: tl.constexpr,
    BITS: tl.constexpr, WORDS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (B * HEADS * tiles, WORDS): a word of the codes of KEYS keys of one head.

    Args:
        keys: [B, HEADS, count, DIM], its rows and heads of_row and of_head numbers apart.
        centre: float32 [B, HEADS, DIM], subtracted first, or None; linear: float32 [DIM, BITS].
        codes, norms: int64 [B, HEADS, count, WORDS], bfloat16 [B, HEADS, count] or None, written.
    """
    at, word = tl.program_id(0) // tiles, tl.program_id(1)
    rows, bits = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS), 64 * word + tl.arange(0, 64)
    head = keys + (at // HEADS).to(tl.int64) * of_row + (at % HEADS).to(tl.int64) * of_head
    p, squares = tl.zeros([KEYS, 64], tl.float32), tl.zeros([KEYS], tl.float32)
    for low in tl.static_range(0, DIM, DEPTH):
        dims = low + tl.arange(0, DEPTH)
        there = rows[:, None] < count
        x = tl.load(head + rows[:, None].to(tl.int64) * DIM + dims[None, :], mask=there, other=0.0).to(tl.float32)
        if centre is not None:
            x -= tl.load(centre + at * DIM + dims)[None, :]
        weights = tl.load(linear + dims[:, None] * BITS + bits[None, :], mask=bits[None, :] < BITS, other=0.0)
        p = tl.dot(x, weights, p, input_precision="ieee")
        squares += tl.sum(x * x, 1)
    to = at.to(tl.int64) * count + rows
    tl.store(codes + to * WORDS + word, pack((p >= 0) & (bits[None, :] < BITS)), mask=rows < count)
    if norms is not None:
        tl.store(norms + to, tl.sqrt_rn(squares).to(tl.bfloat16), mask=(rows < count) & (word == 0))


def encode_many(k: Tensor, centre: Tensor | None, by: Map, norms: bool) -> tuple[Tensor, Tensor | None]:
    """See :func:`hashattn.ops.decode.encode_reference.encode_many`."""
    check_nvidia(k.device)
    (batch, heads, count, dim), bits = k.shape, by.linear.shape[1]
    if k.stride(3) != 1 or k.stride(2) != dim:
        k = k.contiguous()
    words, tiles = -(-bits // 64), triton.cdiv(count, KEYS)
    codes = k.new_empty((batch, heads, count, words), dtype=torch.int64)
    lengths = k.new_empty((batch, heads, count, 1), dtype=NORMS) if norms else None
    constants = {"HEADS": heads, "DIM": dim, "BITS": bits, "WORDS": words, "KEYS": KEYS, "DEPTH": DEPTH}
    with on(k.device):
        encode_tiles[(batch * heads * tiles, words)](
            k, centre, by.linear, codes, lengths, k.stride(0), k.stride(1), count, tiles, **constants, num_warps=WARPS
        )
    return codes, lengths
