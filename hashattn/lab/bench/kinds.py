"""`hashattn bench kinds`: what each kind of step that is served on a GPU costs beside TopK's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hashattn.core.errors import UserError, refusals
from hashattn.core.progress import bar
from hashattn.lab.bench.cases import Case, Settings
from hashattn.lab.bench.cuda import refuse
from hashattn.lab.bench.cuda_contenders import row_distances
from hashattn.lab.bench.cuda_graphs import (
    Step,
    capture_turns,
    checked_step,
    dense_graphs,
    make_layers,
    turns_of,
)
from hashattn.lab.bench.cuda_inputs import GpuLayer, with_before, with_estimate, with_signs
from hashattn.lab.bench.cuda_reads import reads
from hashattn.lab.bench.cuda_steps import kernels, rule, why_not
from hashattn.lab.bench.families import FamilyKind, family_kinds
from hashattn.lab.bench.floors import Machine, Reads, floors
from hashattn.lab.bench.graphs import measure_machine, take_turns
from hashattn.ops.decode import Scratch
from hashattn.selectors import Consensus, LocalTopK, Momentum, Recent, Selector, Sink, Threshold, Tiers, TopK

SIZES = ((1, 131072, 1024),)  # batch, keys, k
LEAST = 128  # keys kept, sinks and recents among them
TOPK, IN_TRITON, DASHKV = "TopK", "TopK in Triton", "DASH-KV, votes, a prior, half critical"


@dataclass(frozen=True)
class Kind:
    """A kind of step. MixedPrecision attends to tiers, ExactAttend to anything else.

    Attributes:
        planes: of its queries.
        triton: take Triton's kernels even where there are faster ones.
    """

    selector: Selector
    planes: int = 1
    triton: bool = False

    def floors(self, case: Case, bits: int, per: str, machine: Machine, read: Reads) -> dict[str, Any]:
        """What it is written in, and what it cannot be faster than."""
        own = {"kernels": "Triton" if self.triton else kernels(), "planes": self.planes}
        return own | floors(case, bits, per, machine, read, self.planes)


def kinds(case: Case, per: str, radius: int) -> dict[str, Kind]:
    """What is measured, by name.

    Args:
        per: "query_head" or "kv_head".
        radius: of Threshold.
    """
    n, k = case.keys, case.k
    topk, within = TopK(k=k, per=per), f"Threshold, radius {radius}"
    found = {
        TOPK: Kind(topk),
        "TopK, 4 sinks, 64 recents": Kind(Sink(4) | Recent(64) | topk),
        "TopK, queries of 2 planes": Kind(topk, planes=2),
        f"{within}, at most {2 * k:,}": Kind(Threshold(radius, limit=2 * k, per=per)),
        within: Kind(Threshold(radius, per=per)),
    }
    for own in (16, 32):
        found[f"LocalTopK, {own} a chunk"] = Kind(LocalTopK(-(-k // own) * own, own, per=per))
    found[IN_TRITON] = Kind(topk, triton=True)
    for critical in (k // 2, k // 64):  # shares that are rounded up to so many keys
        found[f"Tiers, {critical:,} critical"] = Kind(Tiers((critical - 0.5) / n, (k - 0.5) / n, per=per))
    found["TopK, votes"] = Kind(Consensus(topk))
    found[DASHKV] = Kind(Momentum(Consensus(Tiers((k // 2 - 0.5) / n, (k - 0.5) / n, per=per))))
    found[f"{DASHKV}, in Triton"] = replace(found[DASHKV], triton=True)
    return found


def radius_for(distances: Tensor, k: int, step: int) -> int:
    """The radius that keeps about k keys a choice, on average.

    Args:
        distances: int32 [choices, keys], summed where a group chooses.
        step: by how much the largest sum that is kept grows with the radius: the query heads that choose together.
    """
    within = torch.bincount(distances.flatten()).cumsum(0)[::step] / len(distances)
    return int((within - k).abs().argmin())


@torch.inference_mode()
def run(
    cases: Iterable[Case], settings: Settings, *, only: str | None = None, families: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Check and measure every kind of step. Keys are random: what is measured is cost, not quality.

    Args:
        cases: what to measure.
        settings: how; keys are not clustered.
        only: a part of the names of the kinds that are measured beside TopK; None for all.
        families: measure other scores than Hamming distances beside TopK, and no other kinds of these.
        progress: show a bar, on a terminal.

    Returns:
        {"read_GB_per_s", "sm_clock_MHz", "multiprocessors", "notes", "rows"}, times in microseconds a layer.

    Raises:
        RuntimeError: a step or a contender is wrong: nothing is measured then.
        ValueError: there is no GPU, the step does not serve a case, or too few keys are kept.
    """
    cases = list(cases)
    with refusals(ValueError):
        refuse(cases, settings)
    few = next((case for case in cases if case.k < LEAST), None)
    if few is not None:
        raise UserError(f"--keys: bench kinds keeps at least {LEAST} keys, sinks and recents among them, got {few.k}")
    machine = measure_machine()
    notes = machine.remarks()
    rows: list[dict[str, Any]] = []
    for case in bar("hf", "hashattn bench", cases, desc="bench", unit="case", shown=progress):
        rows += _measure(case, settings, (only or "", families), machine, notes)
        torch.cuda.empty_cache()
    return machine.described() | {"notes": list(notes), "rows": rows}


def _measure(
    case: Case, settings: Settings, which: tuple[str, bool], machine: Machine, notes: dict[str, None]
) -> list[dict[str, Any]]:
    bits, (only, others) = settings.bits, which
    made = make_layers(case, bits, clustered=False, planes=2)
    layers = [with_before(with_estimate(layer), case.k) for layer in made]
    by_planes = {1: [with_signs(layer) for layer in layers], 2: layers}
    graphs = dense_graphs(case, layers, turns_of(layers), notes)
    baselines, scratch = tuple(graphs), Scratch()
    measured: dict[tuple[str, str], tuple[Kind | FamilyKind, Reads]] = {}
    for per in settings.pers:
        for name, kind in _served(case, bits, per, layers[0], notes).items():
            if (others or only not in name) and name not in (TOPK, IN_TRITON):
                continue
            own = by_planes[kind.planes]
            step: Step = checked_step(case, rule(case, kind.selector), own, scratch, triton=kind.triton)
            measured[per, name] = kind, reads(case, step, turns_of(own))
            graphs[f"{per} {name}"] = capture_turns(step, turns_of(own))
    for per in settings.pers:
        for name, family in (_of_families(case, per, only, made[0], notes) if others else {}).items():
            own = [family.of(layer) for layer in by_planes[1]]
            step = checked_step(case, rule(case, family.selector), own, scratch)
            measured[per, name] = family, reads(case, step, turns_of(own))
            graphs[f"{per} {name}"] = capture_turns(step, turns_of(own))
    calls = len(turns_of(layers))
    us = take_turns(graphs, calls, settings.rounds)
    baseline = min(baselines, key=lambda name: us[name])
    rows = []
    for (per, name), (its, read) in measured.items():
        step_us = us[f"{per} {name}"]
        rows.append(
            case.described(per, bits)
            | {"kind": name, "selector": repr(its.selector)}
            | its.floors(case, bits, per, machine, read)
            | {"layers": len(layers), "calls": calls, "dense": baseline}
            | {"us": {b: us[b] for b in baselines} | {"step": step_us}, "speedup": us[baseline] / step_us}
            | {"of_topk": step_us / us[f"{per} {TOPK}"], "of_topk_in_triton": None}
            | {"kept": read.kept, "keys_read": read.keys, "values_read": read.values}
        )
        if rows[-1]["kernels"] == "Triton" and f"{per} {IN_TRITON}" in us:
            rows[-1]["of_topk_in_triton"] = step_us / us[f"{per} {IN_TRITON}"]
    return rows


def _served(case: Case, bits: int, per: str, layer: GpuLayer, notes: dict[str, None]) -> dict[str, Kind]:
    """The kinds that are served, and why others are not."""
    shared = per == "kv_head"
    radius = radius_for(row_distances(layer, shared), case.k, case.q_heads // case.kv_heads if shared else 1)
    found = {}
    for name, kind in kinds(case, per, radius).items():
        reason = why_not(case, bits, kind.selector, kind.planes)
        if reason is None:
            found[name] = kind
        else:
            notes[f"{name} is left out per {per}: {reason}"] = None
    return found


def _of_families(case: Case, per: str, only: str, layer: GpuLayer, notes: dict[str, None]) -> dict[str, FamilyKind]:
    """The same of other families of scores."""
    found = {}
    for name, kind in family_kinds(case, per, layer.keys.device).items():
        reason = kind.why_not(case)
        if only in name and reason is None:
            found[name] = kind
        elif reason is not None:
            notes[f"{name} is left out per {per}: {reason}"] = None
    return found
