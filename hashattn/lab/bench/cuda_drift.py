"""Steps whose queries change as a real model's do: how often a hint misses, and what the slowest steps take.

What a hint has to follow is the distance of the k-th nearest key, which the drawn queries let wander as it was measured
in SmolLM2-135M: 400 positions of a text of 3,000 tokens, 63 heads, 64-bit SimHash, the nearest 2%.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hashattn.lab.bench.cases import Case
from hashattn.lab.bench.cuda_check import check_step
from hashattn.lab.bench.cuda_inputs import GpuLayer, make_layer
from hashattn.lab.bench.cuda_steps import Result, first_bounds, fused
from hashattn.lab.bench.graphs import capture
from hashattn.lab.steps import median_and_p99
from hashattn.ops.attend.reference import gather
from hashattn.ops.decode import Rule, Scratch
from hashattn.ops.hamming import pack_bits
from hashattn.ops.hamming.reference import distances

STEPS, SETTLING = 1000, 16  # the first ones have no hint yet
SPREAD = 1.5  # bits of 64: standard deviation of a head's k-th nearest distance from step to step
LASTING = 0.33  # its correlation from one step to the next
NEAR = 1 / 8  # of the bits of a near key differ from what the queries look for
SLOPE = 1 - 2 * NEAR  # by how much a near key's distance grows with a bit of a query that differs

Step = Callable[[], Result]


def wandering(rows: int, steps: int, bits: int, generator: torch.Generator) -> Tensor:
    """int64 [steps, rows]: by how many bits a query differs from what it looks for."""
    scale = bits / 64 * SPREAD / SLOPE
    x = torch.empty(steps, rows, device=generator.device)
    noise = torch.randn(steps, rows, generator=generator, device=generator.device)
    x[0] = noise[0]
    for i in range(1, steps):
        x[i] = LASTING * x[i - 1] + (1 - LASTING**2) ** 0.5 * noise[i]
    return (bits * NEAR + scale * x).round().clamp(0, bits // 4).long()


def drifting(case: Case, bits: int, steps: int, device: torch.device) -> tuple[GpuLayer, Tensor]:
    """A layer of random keys, 2k of which are near, and the queries of so many steps, int64 [steps, B, Hq, 1, 1, W].

    The layer has one query, whose memory is rewritten for each step.
    """
    layer = make_layer(case, bits, steps=1, clustered=False, seed=1, device=device)
    g = torch.Generator(device).manual_seed(2)
    kv, group = (case.batch, case.kv_heads), case.q_heads // case.kv_heads
    wanted = torch.randint(0, 2, (*kv, 1, bits), generator=g, device=device, dtype=torch.bool)
    near = min(case.keys, 2 * case.k)
    columns = torch.arange(near, device=device) * case.keys // near
    other = torch.rand(*kv, near, bits, generator=g, device=device) < NEAR
    layer.codes[:, :, columns] = pack_bits(wanted ^ other)
    flips = wandering(case.batch * case.q_heads, steps, bits, g).view(steps, *kv, group, 1)
    queries = []
    for count in flips:
        order = torch.rand(*kv, group, bits, generator=g, device=device).argsort(-1).argsort(-1)
        queries.append(pack_bits(wanted ^ (order < count)).view(case.batch, case.q_heads, 1, 1, -1))
    found = torch.stack(queries)
    return replace(layer, query=[found[0].clone()]), found


def thresholds(layer: GpuLayer, ids: Tensor) -> Tensor:
    """int32 [rows]: the distance, summed over a group that chooses together, of the farthest key that was kept.

    Args:
        ids: int32 [B, H, 1, K], -1 for none.
    """
    rows = ids.shape[0] * ids.shape[1]
    codes = gather(layer.codes, ids).view(1, rows, ids.shape[-1], -1)
    query = layer.query[0][:, :, :, -1].reshape(1, -1, 1, codes.shape[-1])
    found = distances(query, codes).view(rows, -1, ids.shape[-1]).sum(1, dtype=torch.int32)
    return found.masked_fill(ids.view(rows, -1) < 0, -1).amax(-1)


def missed(step: Step, layer: GpuLayer, queries: Tensor, bounds: Tensor) -> int:
    """How many hints of rows fell short of what the step then kept, after the first steps."""
    counts = []
    for query in queries:
        layer.query[0].copy_(query)
        hint = bounds[0] >> 4  # in sixteenths
        counts.append((thresholds(layer, step()[2]) > hint).sum())
    return int(torch.stack(counts[SETTLING:]).sum())


def times(step: Step, layer: GpuLayer, queries: Tensor) -> list[float]:
    """Microseconds of each step, replayed from a graph, with cold keys, after the first steps."""
    graph = capture([step])
    other = torch.ones(1 << 27, device="cuda")
    marks = []
    for query in queries:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        layer.query[0].copy_(query)
        other.sum()  # empties the cache, and keeps the device busy while the graph is launched
        start.record()
        graph.replay()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in marks[SETTLING:]]


def measure(case: Case, rule: Rule, bits: int, scratch: Scratch) -> dict[str, Any]:
    """Check a step of exact top-k on such queries, count its missed hints, and time every step.

    Returns:
        {"steps", "missed_per_1000", "p50_us", "p99_us", "max_us"}; hints of rows, per thousand steps.

    Raises:
        RuntimeError: the step is wrong.
    """
    layer, queries = drifting(case, bits, STEPS + SETTLING, torch.device("cuda"))
    bounds = first_bounds(layer, rule)

    def step() -> Result:
        return fused(layer, 0, bounds, rule, scratch)

    check_step(step, layer, bounds, rule, case)
    bounds.zero_()
    misses = missed(step, layer, queries, bounds)
    bounds.zero_()
    us = times(step, layer, queries)
    p50, p99 = median_and_p99(us)
    return {
        "steps": len(us),
        "missed_per_1000": misses / len(us) * 1000,
        "p50_us": p50,
        "p99_us": p99,
        "max_us": max(us),
    }
