"""The contenders of a case on a GPU: checked, then captured as CUDA graphs that pass over its layers and queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.errors import Failure
from hashattn.index import FlatHamming
from hashattn.lab.bench.cases import Case
from hashattn.lab.bench.cuda_check import check_dense, check_step, check_whole
from hashattn.lab.bench.cuda_contenders import dense
from hashattn.lab.bench.cuda_inputs import GpuLayer, layer_count, make_layer, step_count
from hashattn.lab.bench.cuda_steps import Result, first_bounds, fused, has_stages, rule, whole
from hashattn.lab.bench.graphs import Captured, capture
from hashattn.ops.decode import Rule, Scratch
from hashattn.selectors import Selector

Call = Callable[[GpuLayer, int], object]  # of a layer and the number of its query
Step = Callable[..., Result]  # the same, and whether to scan only
Turns = Sequence[tuple[GpuLayer, int]]


def make_layers(case: Case, bits: int, clustered: bool, planes: int = 1) -> list[GpuLayer]:
    """Layers of a case, with queries of so many planes."""
    count = layer_count(case, bits)
    steps, device = step_count(count), torch.device("cuda")
    return [
        make_layer(case, bits, steps=steps, clustered=clustered, seed=seed, device=device, planes=planes)
        for seed in range(count)
    ]


def turns_of(layers: Sequence[GpuLayer]) -> Turns:
    """The order in which a graph passes over layers and their queries."""
    return [(layer, i) for i in range(len(layers[0].q)) for layer in layers]


def dense_graphs(case: Case, layers: Sequence[GpuLayer], turns: Turns, notes: dict[str, None]) -> dict[str, Captured]:
    """Every dense contender that serves the case, checked and captured.

    Raises:
        RuntimeError: one is wrong, or none serves.
    """
    graphs = {}
    for name, attend in dense().items():

        def call(layer: GpuLayer, i: int, attend: Any = attend) -> Any:
            return attend(layer.q[i], layer.keys, layer.values)

        try:
            out = call(layers[0], 0)
            graphs[name] = capture_turns(call, turns)
        except Exception as error:  # each library has its own way to say that it does not serve a shape
            notes[f"{name} is left out at {case.shape}: {first_line(error)}"] = None
            continue
        check_dense(name, out, layers[0], case)
    if not graphs:
        raise Failure(f"{case}: no dense attention ran; nothing is measured")
    return graphs


def checked_step(case: Case, rule: Rule, layers: Sequence[GpuLayer], scratch: Scratch, *, triton: bool = False) -> Step:
    """The fused step on these layers, each with hints of its own, checked on the first one.

    Args:
        triton: take Triton's kernels even where there are faster ones.

    Raises:
        RuntimeError: it is wrong.
    """
    bounds = {id(layer): first_bounds(layer, rule) for layer in layers}

    def step(layer: GpuLayer, i: int, scan_only: bool = False) -> Result:
        return fused(layer, i, bounds[id(layer)], rule, scratch, scan_only, triton)

    first = layers[0]
    check_step(lambda: step(first, 0), first, bounds[id(first)], rule, case)
    bounds[id(first)].zero_()
    return step


def step_graphs(
    case: Case,
    selector: Selector,
    step: Step,
    layers: Sequence[GpuLayer],
    turns: Turns,
    caches: Mapping[str, Sequence[KVCache]],
) -> dict[str, Captured]:
    """The checked step of a selector, its scan, and the whole step with each encoder, checked as well; captured.

    Args:
        caches: of whole steps, for each encoder's name one a layer; empty for none.

    Raises:
        RuntimeError: a whole step is wrong.
    """
    asked = rule(case, selector)
    calls: dict[str, Call] = {"step": step}
    if has_stages(asked):
        calls["scan"] = lambda layer, i: step(layer, i, scan_only=True)
    for name, held in caches.items():
        attn = HashAttention(held[0].encoder, FlatHamming(), selector, engine="gpu")
        check_whole(f"{case}: the step with its {name} encoder", attn, held[0], layers[0])
        calls[name] = whole(attn, layers, held)
    return {name: capture_turns(call, turns) for name, call in calls.items()}


def capture_turns(call: Call, turns: Turns) -> Captured:
    """One graph of a call for every layer and query."""
    return capture([lambda layer=layer, i=i: call(layer, i) for layer, i in turns])  # type: ignore[misc]


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).splitlines() or [type(error).__name__])[0]
