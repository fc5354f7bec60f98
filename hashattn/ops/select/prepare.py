"""A step of any family of scores, made ready: a call rewrites pointers and launches three kernels."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from hashattn.ops.attend.constants import ROWS, attend_constants
from hashattn.ops.attend.triton import attend_ids
from hashattn.ops.decode.device import capability, check_nvidia, on, registers, starts_early
from hashattn.ops.decode.inputs import Before, Inputs, Outputs
from hashattn.ops.decode.kernels import Decode
from hashattn.ops.decode.sizes import carve, grid
from hashattn.ops.decode.triton.decode import float_bits
from hashattn.ops.positions.triton import list_forced
from hashattn.ops.select.family import Scores
from hashattn.ops.select.plan import BINS, CHUNK, Plan
from hashattn.ops.select.triton import choose, scan

WARPS = 8  # of a program that scores or chooses
Choosing = Callable[[Tensor, Tensor], None]  # of packed queries, and ids to write
FARTHEST = 2**31 - 2  # a radius beyond it leaves nothing out


def prepare(like: Inputs, scores: Scores | None, stages: int = 3) -> Decode:
    """A step like this one, of other queries. It neither waits for the device nor asks it anything.

    Args:
        like: q may be any view, the others are contiguous.
        stages: how many of the three kernels are launched, to time them; what the others write is not written then.
    """
    check_nvidia(like.q.device)
    plan, stored, device, state = Plan.of(like), like.stored, like.q.device, like.bounds
    assert state is not None and like.workspace is not None
    held, heads = carve(like.workspace, plan.buffers), plan.q_heads // plan.summed
    choosing = forced(like, plan, held) if scores is None else nearest(like, plan, held, scores, stages)
    attending = attend_constants(plan.q_heads, heads, plan.kv_heads, plan.head_dim, device)
    shape, attends = (plan.batch, heads, plan.tokens, plan.slots), grid(plan.slots // ROWS, plan.rows, plan.batch)

    def step(q: Tensor, query: Tensor, scale: float, before: Before | None = None) -> Outputs:
        q = q.contiguous()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ids = q.new_empty(shape, dtype=torch.int32)
        with on(device):
            choosing(query, ids)
            if stages > 2:
                given = q, stored.keys, stored.values, ids, held["filled"], stored.length, held["parts"], held["stats"]
                numbers = scale, plan.room, plan.limit, plan.slots, plan.tokens
                attend_ids[attends](*given, state[3], out, lse, None, *numbers, **attending)
        return Outputs(out, lse, ids)

    return step


def nearest(like: Inputs, plan: Plan, held: dict[str, Tensor], scores: Scores, stages: int) -> Choosing:
    """Launches of the kernels that score keys and choose the nearest."""
    rule, state, device = plan.rule, like.bounds, like.q.device
    ranks, counts, listed, filled = (held[name] for name in ("ranks", "counts", "listed", "filled"))
    common = {"CHUNK": CHUNK, "BINS": BINS} | _both(like)
    a, b, c = scores.shape
    scanning = common | {"LOAD": scores.load, "SCORE": scores.score, "A": a, "B": b, "C": c, "G": plan.group}
    scanning |= {"SUM": plan.summed, "TILE": scores.tile, "RADIUS": rule.radius is not None, "num_warps": WARPS}
    scanning |= registers(capability(device), scores.many)
    choosing = common | {"HEADS": plan.group // plan.summed, "SHARE": rule.share is not None, "num_warps": WARPS}
    choosing |= registers(capability(device), many=True)
    of_query, last = prod(like.query.shape[3:]), (plan.rows, plan.kv_heads, plan.tokens)
    wanted = float_bits(rule.share or 0.0), rule.k or 0, rule.least
    scans = grid(plan.chunks, plan.batch * plan.kv_heads * plan.tokens, plan.batch)
    lists, ends = grid(plan.segments, plan.rows, plan.batch), (like.starts, like.stored.length)
    numbers = rule.sinks, rule.recents, min(rule.radius or 0, FARTHEST), scores.stride, of_query, plan.limit
    sizes = *wanted, plan.limit, plan.chunks, plan.segment, plan.slots, *last

    def launch(query: Tensor, ids: Tensor) -> None:
        scan[scans](query, scores.codes, ranks, counts, state, *ends, *numbers, plan.chunks, *last, **scanning)
        if stages > 1:
            choose[lists](ranks, counts, state, listed, ids, filled, *ends, *sizes, **choosing)

    return launch


def forced(like: Inputs, plan: Plan, held: dict[str, Tensor]) -> Choosing:
    """Launch of the kernel that lists the keys which are kept for their position."""
    rule, ends = plan.rule, (like.starts, like.stored.length)
    constants = {"HEADS": plan.group // plan.summed, "TILE": 1024, "num_warps": 4} | _both(like)
    numbers = rule.sinks, rule.recents, plan.limit, plan.slots, plan.kv_heads, plan.tokens
    lists = grid(triton.cdiv(plan.slots, 1024), plan.rows, plan.batch)

    def launch(query: Tensor, ids: Tensor) -> None:
        list_forced[lists](ids, held["filled"], *ends, *numbers, **constants)

    return launch


def _both(like: Inputs) -> dict[str, Any]:
    """What both kernels are compiled with."""
    early = starts_early(like.q.device)
    return {"CAUSAL": like.causal, "PDL": early} | ({"launch_pdl": True} if early else {})
