"""The fused decode step on a GPU: exact top-k attention in two kernels."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.scan import scan
from hashattn.ops.decode.scratch import Scratch
from hashattn.ops.decode.topk import attend_topk

CHUNK = 2048  # keys of a program of the first kernel
ROWS = 64  # keys of a program of the second


def decode(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, rule: Rule, scratch: Scratch, *, scale: float, causal: bool = True, scan_only: bool = False,
    estimate: Estimate | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """See :func:`hashattn.ops.decode.reference.decode`. The step neither waits for the device nor asks it anything.

    Args:
        scan_only: launch the first kernel alone, to time it; what is returned is not written then.
        bounds: int32, one for each row of ids, zeros at first: how far candidates are looked for, which the step
            rewrites for the next one like it. A bound that turns out wrong costs time and changes nothing.
        scratch: what steps on the same stream share.
    """
    batch, q_heads, tokens, dim = q.shape
    kv_heads, room, code_room = keys.shape[1], keys.shape[2], codes.shape[2]
    group, device = q_heads // kv_heads, q.device
    summed = group if rule.shared else 1
    planes, words = query.shape[3:]
    rows, chunks = batch * q_heads // summed * tokens, triton.cdiv(code_room, CHUNK)
    slots = triton.cdiv(max(1, rule.slots(room)), ROWS) * ROWS
    spread = summed * (2**planes - 1)  # the largest share of one bit in a distance
    bins = 32 if spread == 1 else 64 if spread <= 4 else 128
    padded, width = triton.next_power_of_2(summed), triton.next_power_of_2(dim)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    candidates = scratch.borrow("candidates", (rows, chunks, CHUNK), torch.int32, device)
    counts = scratch.borrow("counts", (rows, bins, chunks), torch.uint16, device)
    ids = torch.empty((rows, slots), dtype=torch.int32, device=device)
    tier = None if estimate is None or rule.critical is None else torch.empty_like(ids, dtype=torch.int8)
    parts = scratch.borrow("parts", (rows, slots // ROWS, summed, width), torch.float32, device)
    stats = scratch.borrow("stats", (rows, slots // ROWS, summed, 2), torch.float32, device)
    arrived = scratch.borrow("arrived", (rows,), torch.int32, device)
    radius = min(rule.radius or 0, levels(words, spread))  # no distance is larger
    if rule.radius is not None:
        bounds = scratch.borrow("radius", (rows,), torch.int32, device).fill_(16 * radius)
    lanes = max(n for n in (1, 2, 3, 4) if group // summed % n == 0)
    early = {"launch_pdl": True} if starts_early(device) else {}
    common = {
        "G": group, "SUM": summed, "WORDS": words, "PLANES": planes, "CHUNK": CHUNK, "BINS": bins, "CAUSAL": causal,
        "PDL": bool(early), **early,
    }  # fmt: skip
    scan[(chunks, rows // lanes)](
        query, codes, bounds, candidates, counts, starts, length, rule.sinks, rule.recents, code_room, chunks, kv_heads,
        tokens, LANES=lanes, num_warps=4, **common,
    )  # fmt: skip
    if scan_only:
        return out, lse, ids.view(batch, -1, tokens, slots), None
    medium: tuple[Tensor | float | None, ...] = (None, None, None, None, None, 0.0)
    norm_room = 0
    if estimate is not None and tier is not None:
        critical = scratch.constant(rule.critical or 0.0, device)
        medium = critical, estimate.norms, estimate.centre, estimate.a, tier, 2 / estimate.bits
        norm_room = estimate.norms.shape[2]
    attend_topk[(slots // ROWS, rows)](
        q, keys, values, query, codes, bounds, candidates, counts, starts, length,
        scratch.constant(rule.share or 0.0, device), ids, parts, stats, arrived, out, lse, *medium, scale,
        rule.k or 0, radius, rule.sinks, rule.recents, 2 * math.isqrt(spread), room, code_room, norm_room, chunks,
        slots, kv_heads, tokens,
        PADDED=padded if summed == 1 else max(16, padded), PADDED_OUT=padded, DIM=dim, WIDTH=width,
        CHUNKS=triton.next_power_of_2(chunks), LEVELS=levels(words, spread), ROWS=ROWS, SHARE=rule.share is not None,
        RADIUS=rule.radius is not None, TIERS=tier is not None,
        num_warps=attend_warps(width, levels(words, spread)), **common,
    )  # fmt: skip
    shape = (batch, rows // batch // tokens, tokens, slots)
    return out, lse, ids.view(shape), None if tier is None else tier.view(shape)


def levels(words: int, spread: int) -> int:
    """Distances that a histogram of all keys tells apart."""
    return triton.next_power_of_2(64 * words * spread + 4)


def attend_warps(width: int, levels: int) -> int:
    """Warps of a program of the second kernel: two unless its registers would not suffice."""
    return 2 if width <= 128 and levels <= 1024 else 4


def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
