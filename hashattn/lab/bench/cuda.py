"""`hashattn bench gpu`: the fused decode step against the fastest dense attention in the same run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hashattn.core.errors import UserError, refusals
from hashattn.core.progress import bar
from hashattn.lab.bench import cuda_drift
from hashattn.lab.bench.cases import Case, Settings
from hashattn.lab.bench.cuda_contenders import row_distances
from hashattn.lab.bench.cuda_graphs import (
    capture_turns,
    checked_step,
    dense_graphs,
    first_line,
    make_layers,
    step_graphs,
    turns_of,
)
from hashattn.lab.bench.cuda_reads import reads
from hashattn.lab.bench.cuda_steps import encoders, kernels, rule, selectors, whole_caches, why_not
from hashattn.lab.bench.faiss_gpu import faiss_us
from hashattn.lab.bench.floors import Machine, floors
from hashattn.lab.bench.graphs import WARM_UP, measure_machine, take_turns
from hashattn.ops.decode import Scratch, why_not_nvidia


def need_gpu(what: str) -> None:
    """Raise UserError unless there is a GPU."""
    if torch.version.hip is not None:
        raise UserError(f"{what}: {why_not_nvidia()}; hashattn bench cpu measures the CPU")
    if not torch.cuda.is_available():
        raise UserError(
            f"{what} needs an NVIDIA GPU, and torch {torch.__version__} sees none: run it where nvidia-smi "
            "lists one, with a CUDA build of torch; hashattn bench cpu measures the CPU"
        )


def refuse(cases: Iterable[Case], settings: Settings) -> None:
    """Say why these cannot be measured here, if they cannot.

    Raises:
        ValueError: there is no GPU, or the step does not serve a case.
    """
    need_gpu("this benchmark")
    bits = settings.bits
    if bits % 64:
        raise ValueError(f"--bits: the fused step serves codes of 64, 128 or 256 bits, not {bits}")
    for case in cases:
        for per in settings.pers:
            reason = why_not(case, bits, selectors(case, per)["TopK"])
            if reason is not None:
                raise ValueError(f"the fused step does not serve {case.shape} with {bits} bits: {reason}")


@torch.inference_mode()
def run(cases: Iterable[Case], settings: Settings, *, progress: bool = True) -> dict[str, Any]:
    """Check and measure every case with every way to choose. Keys are random: what is measured is cost, not quality.

    Args:
        cases: what to measure.
        settings: how.
        progress: show a bar, on a terminal.

    Returns:
        {"read_GB_per_s", "sm_clock_MHz", "multiprocessors", "notes", "rows"}, times in microseconds a layer.

    Raises:
        RuntimeError: a step or a contender is wrong: nothing is measured then.
        ValueError: there is no GPU, or the step does not serve a case.
    """
    cases = list(cases)
    with refusals(ValueError):
        refuse(cases, settings)
    machine = measure_machine()
    todo = [(case, per) for case in cases for per in settings.pers]
    notes = machine.remarks()
    rows: list[dict[str, Any]] = []
    for case, per in bar("hf", "hashattn bench", todo, desc="bench", unit="case", shown=progress):
        rows += _measure(case, per, settings, machine, notes)
        torch.cuda.empty_cache()
    return machine.described() | {"notes": list(notes), "rows": rows}


def _measure(
    case: Case, per: str, settings: Settings, machine: Machine, notes: dict[str, None]
) -> list[dict[str, Any]]:
    bits, rounds = settings.bits, settings.rounds
    layers = make_layers(case, bits, settings.clustered)
    turns = turns_of(layers)
    graphs = dense_graphs(case, layers, turns, notes)
    baselines, scratch = tuple(graphs), Scratch()
    room = (WARM_UP + rounds + 8) * len(layers[0].q)
    caches = {
        name: whole_caches(case, encoder, layers, room=room, scratch=scratch)
        for name, encoder in encoders(bits).items()
        if encoder.centring is None or case.keys >= encoder.centring.warmup
    }
    choices = {}
    for choice, selector in selectors(case, per).items():
        reason = why_not(case, bits, selector)
        if reason is not None:
            notes[f"{choice} is left out per {per}: {reason}"] = None
            continue
        asked = rule(case, selector)
        step = checked_step(case, asked, layers, scratch)
        # LocalTopK's hints are its chunks'
        drift = cuda_drift.measure(case, asked, bits, scratch) if asked.chunks is None else None
        choices[choice] = kernels(), reads(case, step, turns), drift
        own = step_graphs(case, selector, step, layers, turns, caches)
        graphs |= {f"{choice} {name}": graph for name, graph in own.items()}
    found = {id(layer): row_distances(layer, per == "kv_head") for layer in layers}
    graphs["torch.topk"] = capture_turns(
        lambda layer, _: torch.topk(found[id(layer)], case.k, largest=False, sorted=False), turns
    )
    us = take_turns(graphs, len(turns), rounds)
    others = {name: us[name] for name in (*baselines, "torch.topk")}
    try:
        if per == "kv_head":
            raise RuntimeError("it does not sum the distances of a group")
        others["FAISS"] = faiss_us(layers[0], case.k, rounds)
    except Exception as error:
        notes[f"FAISS is left out per {per}: {first_line(error)}"] = None
    baseline = min(baselines, key=lambda name: us[name])
    rows = []
    for choice, (written_in, read, drift) in choices.items():
        own_names = [name for name in ("step", "scan", *caches) if f"{choice} {name}" in us]
        times = others | {name: us[f"{choice} {name}"] for name in own_names}
        if "scan" in times:
            times["attend"] = times["step"] - times["scan"]
        rows.append(
            case.described(per, bits)
            | {"selector": choice, "kernels": written_in, "clustered": settings.clustered}
            | {"layers": len(layers), "calls": len(turns), "dense": baseline}
            | {"us": times, "speedup": us[baseline] / times["step"]}
            | {"whole_speedup": {name: us[baseline] / times[name] for name in caches}}
            | {"drift": drift}
            | floors(case, bits, per, machine, read)
        )
    return rows
