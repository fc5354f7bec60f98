"""The fused decode step on a GPU: exact top-k attention in two kernels."""

from __future__ import annotations

import math
import struct

import torch
import triton
from torch import Tensor

from hashattn.ops.decode import local
from hashattn.ops.decode.device import capability, on_its_device, registers, starts_early
from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.scan import scan
from hashattn.ops.decode.sizes import CHUNK, ROWS, Sizes, carve, grid
from hashattn.ops.decode.topk import attend_topk


@on_its_device
def decode(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, rule: Rule, workspace: Tensor, *, scale: float, causal: bool = True, scan_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hashattn.ops.decode.reference.decode`. The step neither waits for the device nor asks it anything.

    Args:
        scan_only: launch the first kernel alone, to time it; what is returned is not written then.
        bounds: int32, Sizes.state, zeros at first, which the step rewrites for the next one like it: how far
            candidates are looked for (one that turns out wrong costs time and changes nothing), and zeros.
        workspace: uint8, Sizes.workspace of them at least, whatever it holds; steps on the same stream share it.
    """
    if rule.chunks is not None:
        sizes = Sizes.of(q, query, keys, codes, rule)
        return local.decode(
            q, query, keys, values, codes, starts, length, bounds, sizes, workspace, scale=scale, causal=causal,
            early=starts_early(q.device), scan_only=scan_only,
        )  # fmt: skip
    out, lse, ids, _ = _step(
        q, query, keys, values, codes, starts, length, bounds, None, rule, workspace, scale, causal, scan_only
    )
    return out, lse, ids


@on_its_device
def decode_tiers(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, estimate: Estimate, rule: Rule, workspace: Tensor, *, scale: float, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hashattn.ops.decode.reference.decode_tiers`, and decode for bounds and workspace."""
    out, lse, ids, tier = _step(
        q, query, keys, values, codes, starts, length, bounds, estimate, rule, workspace, scale, causal, False
    )
    assert tier is not None
    return out, lse, ids, tier


def _step(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, estimate: Estimate | None, rule: Rule, workspace: Tensor, scale: float, causal: bool,
    scan_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Either of them: without an estimate all logits are exact, and no tiers are told apart."""
    sizes = Sizes.of(q, query, keys, codes, rule)
    rule = sizes.rule
    group, summed, rows, chunks, slots = sizes.group, sizes.summed, sizes.rows, sizes.chunks, sizes.slots
    words, width, padded = sizes.words, triton.next_power_of_2(sizes.head_dim), triton.next_power_of_2(summed)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    ids = torch.empty((rows, slots), dtype=torch.int32, device=q.device)
    tier = None if estimate is None else torch.empty_like(ids, dtype=torch.int8)
    buffers = carve(workspace, sizes.triton)
    far, arrived = bounds[0], bounds[1]
    radius = min(rule.radius or 0, sizes.farthest)  # no distance is larger
    if rule.radius is not None:
        far.fill_(16 * radius)
    lanes = max(n for n in (1, 2, 3, 4) if group // summed % n == 0)
    early = {"launch_pdl": True} if starts_early(q.device) else {}
    common = {
        "G": group, "SUM": summed, "WORDS": words, "PLANES": sizes.planes, "CHUNK": CHUNK, "BINS": sizes.bins,
        "BIASED": rule.biased,
        "CAUSAL": causal, "PDL": bool(early), **early,
    }  # fmt: skip
    scan[grid(chunks, rows // lanes, sizes.batch)](
        query, codes, far, buffers["candidates"], buffers["counts"], starts, length, rule.sinks, rule.recents,
        sizes.limit, sizes.code_room, chunks, sizes.kv_heads, sizes.tokens, LANES=lanes,
        num_warps=scan_warps(sizes.words, sizes.planes, summed), **common,
    )  # fmt: skip
    shape = sizes.batch, -1, sizes.tokens, slots
    if scan_only:
        return out, lse, ids.view(shape), None
    medium: tuple[Tensor | float | None, ...] = (None, None, None, None, 0.0)
    if estimate is not None:
        medium = estimate.norms, estimate.centre, estimate.a, tier, 2 / estimate.bits
    attend_topk[grid(slots // ROWS, rows, sizes.batch)](
        q, keys, values, query, codes, far, buffers["candidates"], buffers["counts"], starts, length,
        float_bits(rule.share or 0.0), ids, buffers["parts"], buffers["stats"], arrived, out, lse,
        float_bits(rule.critical or 0.0), *medium, scale, rule.k or 0, rule.least, radius, rule.sinks, rule.recents,
        2 * math.isqrt(sizes.spread), sizes.room, sizes.code_room, estimate.norms.shape[2] if estimate else 0, chunks,
        slots, sizes.kv_heads, sizes.tokens,
        PADDED=padded if summed == 1 else max(16, padded), PADDED_OUT=padded, DIM=sizes.head_dim, WIDTH=width,
        CHUNKS=triton.next_power_of_2(chunks), LEVELS=levels(sizes.farthest), ROWS=ROWS,
        SHARE=rule.share is not None, RADIUS=rule.radius is not None, TIERS=estimate is not None,
        **attend_options(width, levels(sizes.farthest), estimate is not None, capability(q.device)), **common,
    )  # fmt: skip
    return out, lse, ids.view(shape), None if tier is None else tier.view(shape)


def float_bits(x: float) -> int:
    """A float64 as int64 of the same bits: kernels take plain floats as float32."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def levels(farthest: int) -> int:
    """Distances that a histogram of all keys tells apart."""
    return triton.next_power_of_2(farthest + 4)


def scan_warps(words: int, planes: int, summed: int) -> int:
    """Warps of a program of the first kernel: more where a key is compared with many words, all of them at once."""
    return 4 if words * planes * summed <= 8 else 8


def attend_options(width: int, levels: int, tiers: bool, capability: tuple[int, int]) -> dict[str, int]:
    """How the second kernel is compiled: for two warps unless their registers would not suffice."""
    warps = 8 if levels > 1024 else 4 if width > 128 else 2
    return {"num_warps": warps, **registers(capability, many=tiers)}
