"""The fused decode step on a GPU: exact top-k attention in two kernels, or LocalTopK in two others."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from hashattn.ops.decode.device import capability, check_nvidia, on, registers, starts_early
from hashattn.ops.decode.inputs import Inputs, Outputs
from hashattn.ops.decode.sizes import CHUNK, ROWS, Sizes, carve, grid
from hashattn.ops.decode.triton import local
from hashattn.ops.decode.triton.scan import scan
from hashattn.ops.decode.triton.topk import attend_topk


def prepare(like: Inputs, scan_only: bool = False) -> Callable[[Tensor, Tensor, float], Outputs]:
    """A step like this one, of other queries. It neither waits for the device nor asks it anything.

    Args:
        like: q may be any view, the others are contiguous.
        scan_only: launch the first kernel alone, to time it; what is returned is not written then.
    """
    check_nvidia(like.q.device)
    if like.rule.chunks is not None:
        return local.prepare(like, scan_only)
    sizes, stored, device, bounds, estimate = Sizes.of(like), like.stored, like.q.device, like.bounds, like.estimate
    assert bounds is not None and like.workspace is not None
    rule, shape = sizes.rule, (sizes.batch, sizes.q_heads // sizes.summed, sizes.tokens, sizes.slots)
    buffers, far, arrived = carve(like.workspace, sizes.triton), bounds[0], bounds[1]
    found, parts = (buffers["candidates"], buffers["counts"]), (buffers["parts"], buffers["stats"])
    ends, last = (like.starts, stored.length), (sizes.kv_heads, sizes.tokens)
    radius = min(rule.radius or 0, sizes.farthest)  # no distance is larger
    early = {"launch_pdl": True} if starts_early(device) else {}
    common: dict[str, Any] = {"G": sizes.group, "SUM": sizes.summed, "WORDS": sizes.words, "PLANES": sizes.planes}
    common |= {"CHUNK": CHUNK, "BINS": sizes.bins, "BIASED": rule.biased, "CAUSAL": like.causal, "PDL": bool(early)}
    scans, scanning = grid(sizes.chunks, sizes.rows // sizes.lanes, sizes.batch), common | early
    scanning |= {"LANES": sizes.lanes, "num_warps": scan_warps(sizes.words, sizes.planes, sizes.summed)}
    attends, attending = grid(sizes.slots // ROWS, sizes.rows, sizes.batch), common | early | constants(sizes)
    attending |= {"SHARE": rule.share is not None, "RADIUS": rule.radius is not None, "TIERS": estimate is not None}
    attending |= attend_options(attending["WIDTH"], attending["LEVELS"], estimate is not None, capability(device))
    share, critical = float_bits(rule.share or 0.0), float_bits(rule.critical or 0.0)
    wanted = rule.k or 0, rule.least, radius, rule.sinks, rule.recents, sizes.margin
    norm_room = 0 if estimate is None else estimate.norms.shape[2]
    rooms = sizes.room, sizes.code_room, norm_room, sizes.chunks, sizes.slots

    def step(q: Tensor, query: Tensor, scale: float) -> Outputs:
        q = q.contiguous()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ids = q.new_empty(shape, dtype=torch.int32)
        medium: tuple[Tensor | float | None, ...] = (None, None, None, None, 0.0)
        tier = None if estimate is None else torch.empty_like(ids, dtype=torch.int8)
        if estimate is not None:
            medium = estimate.norms, estimate.centre, estimate.a, tier, 2 / estimate.bits
        if rule.radius is not None:
            far.fill_(16 * radius)
        numbers = rule.sinks, rule.recents, sizes.limit, sizes.code_room, sizes.chunks
        with on(device):
            scan[scans](query, stored.codes, far, *found, *ends, *numbers, *last, **scanning)
            if not scan_only:
                given = q, stored.keys, stored.values, query, stored.codes, far, *found, *ends, share
                results = ids, *parts, arrived, out, lse
                attend_topk[attends](*given, *results, critical, *medium, scale, *wanted, *rooms, *last, **attending)
        return Outputs(out, lse, ids, tier)

    return step


def decode(x: Inputs, scan_only: bool = False) -> Outputs:
    """One step."""
    return prepare(x, scan_only)(x.q, x.query, x.scale)


def constants(sizes: Sizes) -> dict[str, Any]:
    """What the second kernel is compiled with beside what both are."""
    padded = triton.next_power_of_2(sizes.summed)
    return {
        "PADDED": padded if sizes.summed == 1 else max(16, padded),
        "PADDED_OUT": padded,
        "DIM": sizes.head_dim,
        "WIDTH": triton.next_power_of_2(sizes.head_dim),
        "CHUNKS": triton.next_power_of_2(sizes.chunks),
        "LEVELS": levels(sizes.farthest),
        "ROWS": ROWS,
    }


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
