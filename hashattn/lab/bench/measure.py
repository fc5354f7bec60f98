"""Timing: contenders take turns, medians are reported, keys are cold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def take_turns(
    calls: Mapping[str, Callable[[int], object]], layers: int, rounds: int, wait: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median microseconds of each call.

    In a round every contender passes once over all layers, as a model does when it decodes a token: the code is warm,
    the keys of a layer are as cold as the layers before it have made them. Rounds take turns, so that a noisy machine
    slows all contenders alike. The first round is not counted.

    Args:
        calls: each takes the number of a layer.
        layers: from 0 to here.
        rounds: that are counted.
        wait: for a device that works on its own.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            wait()
            began = time.perf_counter()
            for layer in range(layers):
                call(layer)
            wait()
            if i:
                times[name].append((time.perf_counter() - began) / layers * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def read_bandwidth() -> float:
    """Bytes a second that a sum over 512 MB reads, with the threads that torch uses."""
    x = torch.ones(1 << 27)
    return x.numel() * x.element_size() / (take_turns({"sum": lambda _: x.sum()}, 1, 5)["sum"] / 1e6)
