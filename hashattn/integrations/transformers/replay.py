"""Replay: a call of a model that a graph serves. Done: one that has run. And what is kept of the graphs of a cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hashattn.integrations.attached.layers import ServedLayer
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.model_graph import ModelGraph
from hashattn.integrations.transformers.step_call import StepCall
from hashattn.integrations.transformers.step_run import StepRun


@dataclass
class GraphCounts:
    """What was done with graphs: see :class:`hashattn.integrations.attached.report.GraphUse`."""

    replayed: int = 0
    captured: int = 0
    largest: int = 0
    eager: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class CacheGraphs:
    """The graphs of one cache.

    Attributes:
        layers: of the cache, those that are served.
        served: by what.
        by_call: what the graphs serve.
        runs: what has run and can be captured, likewise.
        refused: why some calls have none, for want of memory.
        sure: whether the last replay came to its end, so that the host knows what was appended.
    """

    layers: list[HashedLayer]
    served: Mapping[int, ServedLayer]
    by_call: dict[Any, ModelGraph] = field(default_factory=dict)
    runs: dict[Any, StepRun] = field(default_factory=dict)
    refused: dict[Any, str] = field(default_factory=dict)
    sure: bool = True


@dataclass(eq=False)
class Replay:
    """One replay that is to be."""

    counts: GraphCounts
    held: CacheGraphs
    graph: ModelGraph
    layers: Sequence[HashedLayer]
    call: StepCall

    def __call__(self) -> Any:
        """Run it; returns what the module would."""
        assert self.call.shape is not None
        tokens, steps = self.call.shape[1], [layer.on_device for layer in self.layers]
        behind = steps[0].behind
        if all(one.behind == behind for one in steps):
            self.graph.rewind(behind)
        else:  # someone has looked at some of them
            for one in steps:
                one.settle()
        for name, x in self.graph.inputs.items():
            x.copy_(self.call.changing[name], non_blocking=True)
        self.held.sure = False
        self.graph.replay()
        for layer in self.layers:
            layer.lead(tokens, self.call.why_dense)
        self.held.sure = True
        self.counts.replayed += 1
        return self.graph.outputs.given(self.call.cache)


@dataclass(frozen=True, eq=False)
class Done:
    """A call that has run already, as it will be captured."""

    output: Any

    def __call__(self) -> Any:
        """What it returned."""
        return self.output
