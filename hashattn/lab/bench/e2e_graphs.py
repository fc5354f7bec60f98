"""A model's decode step captured, checked and timed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.lab.bench.e2e_attention import DenseLayers, HashedLayers
from hashattn.lab.bench.e2e_check import check_graph
from hashattn.lab.bench.e2e_model import Decoding
from hashattn.lab.bench.graphs import Captured, capture

STEPS = 16  # tokens that are decoded between two looks at the clock


@dataclass(frozen=True)
class CapturedStep:
    """A captured step, and what it attends with."""

    attend: DenseLayers | HashedLayers
    graph: Captured


def capture_step(name: str, decoding: Decoding, attend: DenseLayers | HashedLayers, keys: int) -> CapturedStep:
    """Capture a step, which must do from its graph what it does from Python.

    Raises:
        RuntimeError: it does not.
    """
    attend.restart()
    decoding.restart(keys - 1)
    logits = decoding.step(attend)
    graph = capture([lambda: logits.copy_(decoding.step(attend))])

    def replay() -> Tensor:
        graph.replay()
        return logits

    check_graph(name, decoding, attend, keys, replay)
    return CapturedStep(attend, graph)


def take_turns(decoding: Decoding, steps: Mapping[str, CapturedStep], keys: int, rounds: int) -> dict[str, float]:
    """Median milliseconds a token. Each round starts anew from `keys` keys; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            step.attend.restart()
            decoding.restart(keys - 1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(STEPS):
                step.graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / STEPS)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
