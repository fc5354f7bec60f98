"""Launches the fused decode step: exact top-k in two kernels, LocalTopK in one."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from hashattn.ops.decode.local import attend_local
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.scan import scan
from hashattn.ops.decode.scratch import Scratch
from hashattn.ops.decode.topk import attend_topk

_CHUNK = 2048  # keys of a program of the first kernel
_WARPS = 4
_TILE = 1024
_LOCAL_WARPS = 4
_X = {}
_AW = None
_ROWS = 64  # keys of a program of the second
_RUN = 8  # neighbouring columns that stay together in an interleaved chunk: 64 bytes of codes


def topk_step(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, rule: Rule, scratch: Scratch, out: Tensor, lse: Tensor, *, scale: float, causal: bool = True,
) -> Tensor:  # fmt: skip
    """Exact top-k attention; see :func:`hashattn.ops.decode.decode`. Returns ids, int32 [B, H, T, slots], scratch."""
    batch, q_heads, tokens, dim = q.shape
    kv_heads, room = keys.shape[1:3]
    group = q_heads // kv_heads
    summed = group if rule.shared else 1
    planes, words = query.shape[3:]
    rows, device = batch * q_heads // summed * tokens, q.device
    chunks = triton.cdiv(room, _CHUNK)
    slots = triton.cdiv(max(1, rule.slots(room)), _ROWS) * _ROWS
    spread = summed * (2**planes - 1)  # one bit's largest share in a distance, summed
    bins = 32 if spread == 1 else 64 if spread <= 4 else 128
    padded = triton.next_power_of_2(summed)
    width = triton.next_power_of_2(dim)
    candidates = scratch.borrow("candidates", (rows, chunks, _CHUNK), torch.int32, device)
    counts = scratch.borrow("counts", (rows, bins, chunks), torch.uint16, device)
    ids = scratch.borrow("ids", (rows, slots), torch.int32, device)
    parts = scratch.borrow("parts", (rows, slots // _ROWS, summed, width), torch.float32, device)
    stats = scratch.borrow("stats", (rows, slots // _ROWS, summed, 2), torch.float32, device)
    arrived = scratch.borrow("arrived", (rows,), torch.int32, device)
    share = scratch.constant(rule.share or 0.0, device)
    lanes = max(n for n in (1, 2, 3, 4) if group // summed % n == 0)
    k, radius = rule.k or 0, rule.radius or 0
    pdl = {"launch_pdl": True} if programmatic(device) else {}
    common = {
        "G": group, "SUM": summed, "WORDS": words, "PLANES": planes, "CHUNK": _CHUNK, "BINS": bins,
        "CAUSAL": causal, "PDL": bool(pdl), **pdl,
    }  # fmt: skip
    if rule.radius is not None:
        bounds = scratch.borrow("radius", (rows,), torch.int32, device).fill_(16 * rule.radius)
    scan[(chunks, rows // lanes)](
        query, codes, bounds, candidates, counts, starts, length, rule.sinks, rule.recents, room, chunks, kv_heads,
        tokens, LANES=lanes, num_warps=_WARPS, **common,
    )  # fmt: skip
    attend_topk[(slots // _ROWS, rows)](
        q, keys, values, query, codes, bounds, candidates, counts, starts, length, share, ids, parts, stats, arrived,
        out, lse, scale, k, radius, rule.sinks, rule.recents, 2 * math.isqrt(spread), room, chunks, slots, kv_heads,
        tokens, PADDED=padded if summed == 1 else max(16, padded), PADDED_OUT=padded, DIM=dim, WIDTH=width,
        CHUNKS=triton.next_power_of_2(chunks), LEVELS=triton.next_power_of_2(64 * words * spread + 4), ROWS=_ROWS,
        RADIUS=rule.radius is not None, SHARE=rule.share is not None, num_warps=_AW or (2 if summed == 1 else 4), **common,
    )  # fmt: skip
    return ids.view(batch, -1, tokens, slots)


def local_step(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, rule: Rule, scratch: Scratch, out: Tensor, lse: Tensor, *, scale: float, causal: bool = True,
) -> Tensor:  # fmt: skip
    """Attention to the nearest keys of each interleaved chunk. Returns ids, int32 [B, Hq, T, slots], scratch."""
    assert rule.chunks is not None and rule.k is not None
    batch, q_heads, tokens, dim = q.shape
    kv_heads, room = keys.shape[1:3]
    group, device, chunks = q_heads // kv_heads, q.device, rule.chunks
    planes, words = query.shape[3:]
    lanes = max(n for n in (1, 2, 3, 4) if group % n == 0)
    rows, programs = batch * q_heads * tokens, batch * q_heads * tokens // lanes
    k = rule.k // chunks
    keep = max(16, triton.next_power_of_2(k))
    width = triton.next_power_of_2(dim)
    places = triton.cdiv(room, _RUN * chunks) * _RUN
    tile = min(_TILE, max(256, triton.next_power_of_2(places)))
    candidates = scratch.borrow("candidates", (rows, chunks, places), torch.int32, device)
    ids = scratch.borrow("ids", (rows, chunks, keep), torch.int32, device)
    parts = scratch.borrow("parts", (programs, chunks, lanes, width), torch.float32, device)
    stats = scratch.borrow("stats", (programs, chunks, lanes, 2), torch.float32, device)
    arrived = scratch.borrow("arrived", (programs,), torch.int32, device)
    pdl = {"launch_pdl": True} if programmatic(device) else {}
    attend_local[(chunks, programs)](
        q, keys, values, query, codes, bounds, candidates, starts, length, ids, parts, stats, arrived, out, lse, scale,
        k, rule.radius or 0, rule.sinks, rule.recents, 2 * (2**planes - 1), room, chunks, kv_heads, tokens, G=group,
        LANES=lanes, DIM=dim, WIDTH=width, WORDS=words, PLANES=planes,
        TILE=tile, ROOM=places, KEEP=keep, CAUSAL=causal, PDL=bool(pdl), num_warps=_LOCAL_WARPS, **pdl, **_X,
    )  # fmt: skip
    return ids.view(batch, q_heads, tokens, chunks * keep)


def programmatic(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
