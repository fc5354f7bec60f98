"""Timing on a GPU: contenders are captured as CUDA graphs and take turns; medians of cold replays are reported."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hashattn.lab.bench.floors import Machine

WARM_UP = 5


@dataclass(frozen=True)
class Captured:
    """Calls as one CUDA graph. It points to what the calls hold, and so keeps them."""

    calls: Sequence[Callable[[], object]]
    graph: torch.cuda.CUDAGraph

    def replay(self) -> None:
        """Run the calls again."""
        self.graph.replay()


def capture(calls: Sequence[Callable[[], object]]) -> Captured:
    """One graph of all calls, which run once before: that compiles them and allocates what they share."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Captured(calls, graph)


def take_turns(graphs: Mapping[str, Captured], calls: int, rounds: int) -> dict[str, float]:
    """Median microseconds a call of graphs that hold so many calls each."""
    for graph in graphs.values():
        for _ in range(WARM_UP):
            graph.replay()
    # A large read before each replay empties the L2 cache (a write would leave lines to be written back), and keeps the
    # device busy while the graph is launched.
    other = torch.ones(1 << 27, device="cuda")
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.sum()
            start.record()
            graph.replay()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in of) / calls * 1e3 for name, of in marks.items()}


def measure_machine() -> Machine:
    """The current GPU's bandwidth, by the better of a sum and a copy of 2 GB, and its clock under that load."""
    x = torch.ones(1 << 29, device="cuda")
    y = torch.empty_like(x)
    graphs = {"sum": capture([lambda: x.sum()] * 3), "copy": capture([lambda: y.copy_(x)] * 3)}
    times = take_turns(graphs, 3, 9)
    read = x.numel() * x.element_size() * max(1 / times["sum"], 2 / times["copy"]) * 1e6
    for _ in range(20):
        graphs["sum"].replay()  # the clock is read while the device works
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    clock = _clock(properties)
    torch.cuda.synchronize()
    return Machine(read, properties.multi_processor_count, clock)


def _clock(properties: object) -> float | None:
    """Hz: now, by the driver's library if Python can ask it; else the highest, if torch knows it."""
    try:
        return torch.cuda.clock_rate() * 1e6
    except Exception:  # its library is missing or refuses: each of them raises something else
        kilohertz = getattr(properties, "clock_rate", None)
        return kilohertz * 1e3 if kilohertz else None
