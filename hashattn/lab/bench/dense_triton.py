"""Dense attention of one token, split over the keys: the baseline of our own on GPUs."""

from __future__ import annotations

# What Triton compiles has no Python types.
# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattn.ops.decode.scratch import Scratch
from hashattn.ops.decode.triton.rows import LOG2E, combine, load_rows, store_part

TILE = 64


@triton.jit
def attend_dense(
    q, keys, values, parts, stats, arrived, out, lse, scale, n, room, share, G: tl.constexpr, PADDED: tl.constexpr,
    PADDED_OUT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (splits, B * Hkv). A program attends to `share` of n keys, the last one of a row joins the parts.

    Args:
        q, keys, values: [B, Hkv * G, 1, DIM], [B, Hkv, room, DIM], contiguous, of which n keys are filled.
        parts, stats, arrived: scratch; arrived int32 [B * Hkv] is zero before and after.
        out, lse: [B, Hkv * G, 1, DIM] and float32 [B, Hkv * G, 1], written.
    """
    s, splits = tl.program_id(0), tl.num_programs(0)
    kv = tl.program_id(1)
    dims, heads = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    mask = (heads < G)[:, None] & (dims < DIM)[None, :]
    rows = tl.load(q + (kv * G + heads[:, None]) * DIM + dims[None, :], mask=mask, other=0.0)
    k_at, v_at = keys + kv.to(tl.int64) * room * DIM, values + kv.to(tl.int64) * room * DIM
    peak = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, WIDTH], tl.float32)
    end = tl.minimum((s + 1) * share, n)
    for at in range(s * share, end, TILE):
        columns = at + tl.arange(0, TILE)
        filled = columns < end  # holds a key at least, so that the peak is finite
        k = load_rows(k_at, columns, filled, DIM, WIDTH)
        v = load_rows(v_at, columns, filled, DIM, WIDTH)
        x = tl.dot(rows, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        x = tl.where(filled[None, :], x, float("-inf"))
        higher = tl.maximum(peak, tl.max(x, 1))
        fading = tl.exp2(peak - higher)
        p = tl.exp2(x - higher[:, None])
        total = total * fading + tl.sum(p, 1)
        acc = acc * fading[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = higher
    store_part(parts, stats, kv * splits + s, peak, total, acc, WIDTH, G, PADDED)
    tl.debug_barrier()  # all threads have stored before one says so
    if tl.atomic_add(arrived + kv, 1, sem="acq_rel") == splits - 1:
        tl.store(arrived + kv, 0)
        combine(parts, stats, kv * splits, splits, n, False, out, lse, kv * G, 1, DIM, WIDTH, G, PADDED_OUT, 16)


def attend(q: Tensor, keys: Tensor, values: Tensor, scratch: Scratch, programs: int) -> Tensor:
    """Attention of q [B, Hq, 1, D] to all of keys and values, by about so many programs.

    Args:
        keys, values: [B, Hkv, N, D], contiguous, or the first N columns of contiguous tensors.
    """
    batch, q_heads, _, dim = q.shape
    kv_heads, n = keys.shape[1:3]
    room = keys.stride(1) // dim
    group, rows = q_heads // kv_heads, batch * kv_heads
    splits = min(triton.cdiv(programs, rows), triton.cdiv(n, TILE))
    padded, width = triton.next_power_of_2(group), triton.next_power_of_2(dim)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    attend_dense[(splits, rows)](
        q, keys, values, scratch.borrow("parts", (rows, splits, group, width), torch.float32, q.device),
        scratch.borrow("stats", (rows, splits, group, 2), torch.float32, q.device),
        scratch.borrow("arrived", (rows,), torch.int32, q.device), out, lse, dim**-0.5, n, room,
        triton.cdiv(triton.cdiv(n, TILE), splits) * TILE, G=group, PADDED=max(16, padded), PADDED_OUT=padded, DIM=dim,
        WIDTH=width, TILE=TILE, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
