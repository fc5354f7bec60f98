"""A step of any family of scores, made ready: a call rewrites pointers and launches three kernels."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from hashattn.ops.attend.triton import attend_ids
from hashattn.ops.decode.device import capability, check_nvidia, on, registers, starts_early
from hashattn.ops.decode.inputs import Before, Inputs, Outputs
from hashattn.ops.decode.kernels import Decode
from hashattn.ops.decode.sizes import carve, grid
from hashattn.ops.decode.triton.decode import float_bits
from hashattn.ops.select.family import Scores
from hashattn.ops.select.plan import BINS, CHUNK, ROWS, Plan
from hashattn.ops.select.triton import choose, scan

WARPS = 8  # of a program that scores
FARTHEST = 2**31 - 2  # a radius beyond it leaves nothing out


def prepare(like: Inputs, scores: Scores, stages: int = 3) -> Decode:
    """A step like this one, of other queries. It neither waits for the device nor asks it anything.

    Args:
        like: q may be any view, the others are contiguous.
        stages: how many of the three kernels are launched, to time them; what the others write is not written then.
    """
    check_nvidia(like.q.device)
    plan, stored, device, state = Plan.of(like), like.stored, like.q.device, like.bounds
    assert state is not None and like.workspace is not None
    rule, held, heads = plan.rule, carve(like.workspace, plan.buffers), plan.q_heads // plan.summed
    ranks, counts, listed, filled = (held[name] for name in ("ranks", "counts", "listed", "filled"))
    early = {"launch_pdl": True} if starts_early(device) else {}
    common: dict[str, Any] = {"CHUNK": CHUNK, "BINS": BINS, "CAUSAL": like.causal, "PDL": bool(early), **early}
    a, b, c = scores.shape
    scanning = common | {"LOAD": scores.load, "SCORE": scores.score, "A": a, "B": b, "C": c, "G": plan.group}
    scanning |= {"SUM": plan.summed, "PADDED": triton.next_power_of_2(plan.group // plan.summed), "TILE": scores.tile}
    scanning |= {"RADIUS": rule.radius is not None, "num_warps": WARPS}
    scanning |= registers(capability(device), many=True) if scores.many else {}
    choosing = common | {"HEADS": plan.group // plan.summed, "SHARE": rule.share is not None, "num_warps": 16}
    attending = attend_constants(plan.q_heads, heads, plan.kv_heads, plan.head_dim, device)
    of_query, last = prod(like.query.shape[3:]), (plan.rows, plan.kv_heads, plan.tokens)
    wanted = float_bits(rule.share or 0.0), rule.k or 0, rule.least
    shape = plan.batch, heads, plan.tokens, plan.slots
    grids = (
        grid(plan.chunks, plan.batch * plan.kv_heads * plan.tokens, plan.batch),
        grid(plan.segments, plan.rows, plan.batch),
        grid(plan.slots // ROWS, plan.rows, plan.batch),
    )
    numbers = rule.sinks, rule.recents, min(rule.radius or 0, FARTHEST), scores.stride, of_query, plan.limit

    def step(q: Tensor, query: Tensor, scale: float, before: Before | None = None) -> Outputs:
        q = q.contiguous()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ids = q.new_empty(shape, dtype=torch.int32)
        ends, parts = (like.starts, stored.length), (held["parts"], held["stats"], state[3])
        with on(device):
            scan[grids[0]](query, scores.codes, ranks, counts, state, *ends, *numbers, plan.chunks, *last, **scanning)
            if stages > 1:
                sizes = *wanted, plan.limit, plan.chunks, plan.segment, plan.slots, *last
                choose[grids[1]](ranks, counts, state, listed, ids, filled, *ends, *sizes, **choosing)
            if stages > 2:
                given = q, stored.keys, stored.values, ids, filled, stored.length, *parts, out, lse, None
                attend_ids[grids[2]](*given, scale, plan.room, plan.limit, plan.slots, plan.tokens, **attending)
        return Outputs(out, lse, ids)

    return step


def attend_constants(q_heads: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> dict[str, Any]:
    """What attend_ids is compiled with, for so many choices of a sequence."""
    summed = q_heads // heads
    padded, width = triton.next_power_of_2(summed), triton.next_power_of_2(dim)
    early = {"launch_pdl": True} if starts_early(device) else {}
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "SUM": summed, "PADDED": padded if summed == 1 else max(16, padded),
        "PADDED_OUT": padded, "DIM": dim, "WIDTH": width, "ROWS": ROWS, "PDL": bool(early),
        "num_warps": 4 if width > 128 else 2, **early,
    }  # fmt: skip
