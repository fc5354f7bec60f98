"""`hashattn bench --device cuda`: the fused decode step against the fastest dense attention in the same run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hashattn.bench.cases import DTYPES, Case
from hashattn.bench.cuda_check import check_dense, check_step
from hashattn.bench.cuda_contenders import dense, faiss_us, row_distances
from hashattn.bench.cuda_inputs import Layer, layer_count, make_layer, rule, step_count
from hashattn.bench.floors import Machine, floors
from hashattn.bench.graphs import capture, measure_machine, take_turns
from hashattn.extras import require
from hashattn.ops.decode import Scratch, Sizes, why_not

Result = tuple[Tensor, Tensor, Tensor]  # out, lse, ids


def refuse(cases: Iterable[Case], bits: int, pers: Sequence[str]) -> None:
    """Say why these cannot be measured here, if they cannot.

    Raises:
        RuntimeError: there is no GPU.
        ValueError: the step does not serve a case.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"--device cuda needs an NVIDIA GPU, and torch {torch.__version__} sees none: run it where nvidia-smi "
            "lists one, with a CUDA build of torch; --device cpu measures the CPU"
        )
    if bits % 64:
        raise ValueError(f"--bits: the fused step serves codes of 64, 128 or 256 bits, not {bits}")
    for case in cases:
        for per in pers:
            reason = why_not(
                device="cuda", dtype=DTYPES[case.dtype], head_dim=case.head_dim, group=case.q_heads // case.kv_heads,
                tokens=1, words=bits // 64, planes=1, rule=rule(case, per),
            )  # fmt: skip
            if reason is not None:
                raise ValueError(f"the fused step does not serve {case.shape} with {bits} bits: {reason}")


@torch.inference_mode()
def run(
    cases: Iterable[Case], *, bits: int = 64, pers: Sequence[str] = ("query_head", "kv_head"), clustered: bool = False,
    rounds: int = 11,
) -> dict[str, Any]:  # fmt: skip
    """Check and measure every case with every way to choose. Keys are random: what is measured is cost, not quality.

    Args:
        cases: what to measure.
        bits: of the codes.
        pers: of "kv_head" and "query_head": who chooses.
        clustered: all near keys in one sixty-fourth of the tokens.
        rounds: of which medians are taken.

    Returns:
        {"read_GB_per_s", "sm_clock_MHz", "multiprocessors", "notes", "rows"}, times in microseconds a layer.

    Raises:
        RuntimeError: there is no GPU, or a step or a contender is wrong: nothing is measured then.
        ValueError: the step does not serve a case.
    """
    cases = list(cases)
    refuse(cases, bits, pers)
    machine = measure_machine()
    todo = [(case, per) for case in cases for per in pers]
    notes: dict[str, None] = {} if machine.clock else {"no popcount floor: the clock is not known": None}
    rows = []
    tqdm = require("tqdm", "hf", "hashattn bench").tqdm
    for case, per in tqdm(todo, desc="bench", unit="case", file=sys.stderr):
        rows.append(_measure(case, bits, per, clustered, rounds, machine, notes))
        torch.cuda.empty_cache()
    return {
        "read_GB_per_s": machine.read / 1e9, "sm_clock_MHz": machine.clock and machine.clock / 1e6,
        "multiprocessors": machine.processors, "notes": list(notes), "rows": rows,
    }  # fmt: skip


def fused(layer: Layer, i: int, per: str, case: Case, scratch: Scratch, scan_only: bool = False) -> Result:
    """The step with a layer's query i, or its first kernel alone."""
    from hashattn.ops.decode.triton import decode

    sizes = Sizes.of(layer.q[i], layer.query[i], layer.keys, layer.codes, rule(case, per))
    return decode(
        layer.q[i], layer.query[i], layer.keys, layer.values, layer.codes, layer.starts, layer.length, layer.bounds,
        rule(case, per), scratch.workspace(sizes.workspace, layer.keys.device), scale=case.head_dim**-0.5,
        scan_only=scan_only,
    )  # fmt: skip


def _measure(
    case: Case, bits: int, per: str, clustered: bool, rounds: int, machine: Machine, notes: dict[str, None]
) -> dict[str, Any]:
    count = layer_count(case, bits)
    steps = step_count(count)
    layers = [
        make_layer(case, bits, per, steps=steps, clustered=clustered, seed=seed, device=torch.device("cuda"))
        for seed in range(count)
    ]
    scratch, dense_scratch = Scratch(), Scratch()
    check_step(lambda: fused(layers[0], 0, per, case, scratch), layers[0], rule(case, per), case)
    layers[0].bounds.zero_()
    turns = [(layer, i) for i in range(steps) for layer in layers]

    graphs = {}
    for name, call in dense(dense_scratch).items():
        try:
            out = call(layers[0], 0)
            graphs[name] = _capture(call, turns)
        except Exception as error:  # each library has its own way to say that it does not serve a shape
            notes[f"{name} is left out at {case.shape}: {_first_line(error)}"] = None
            continue
        check_dense(name, out, layers[0], case)
    if not graphs:
        raise RuntimeError(f"{case}: no dense attention ran; nothing is measured")
    baselines = tuple(graphs)
    graphs["step"] = _capture(lambda layer, i: fused(layer, i, per, case, scratch), turns)
    graphs["scan"] = _capture(lambda layer, i: fused(layer, i, per, case, scratch, scan_only=True), turns)
    found = {id(layer): row_distances(layer, per == "kv_head") for layer in layers}
    graphs["torch.topk"] = _capture(
        lambda layer, _: torch.topk(found[id(layer)], case.k, largest=False, sorted=False), turns
    )
    us = take_turns(graphs, len(turns), rounds)
    us["attend"] = us["step"] - us["scan"]
    try:
        if per == "kv_head":
            raise RuntimeError("it does not sum the distances of a group")
        us["FAISS"] = faiss_us(layers[0], case.k, rounds)
    except Exception as error:
        notes[f"FAISS is left out per {per}: {_first_line(error)}"] = None
    baseline = min(baselines, key=lambda name: us[name])
    return {
        "shape": case.shape, "batch": case.batch, "keys": case.keys, "k": case.k, "per": per, "bits": bits,
        "clustered": clustered, "layers": count, "calls": len(turns), "dense": baseline, "us": us,
        "speedup": us[baseline] / us["step"], **floors(case, bits, per, machine),
    }  # fmt: skip


def _capture(call: Callable[[Layer, int], object], turns: Sequence[tuple[Layer, int]]) -> torch.cuda.CUDAGraph:
    return capture([lambda layer=layer, i=i: call(layer, i) for layer, i in turns])  # type: ignore[misc]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
