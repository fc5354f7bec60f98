"""choose: the one place that decides which engine serves a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hashattn.engines.base import Engine, PreparedStep, Request
from hashattn.engines.dense import Dense
from hashattn.engines.gpu import Gpu
from hashattn.engines.host import Host
from hashattn.engines.parts import Parts
from hashattn.engines.stages import Reference

AUTO = "auto"
DENSE: Engine = Dense()
ENGINES: tuple[Engine, ...] = (Gpu(), Host(), Reference(), DENSE)  # "auto" takes the first that serves and is measured
ALIASES = {"triton": "gpu"}


@dataclass(frozen=True)
class Choice:
    """Which engine serves steps of one kind.

    Attributes:
        searched, dense: what runs them, where an engine searches and where it does not.
        wanted: what the composition names, or "auto".
        engine: what searches where there are keys enough; dense attention where nothing ever does.
        least: visible keys from which it does; 0 where it was named.
        crossover: visible keys from which a search is known to be faster; None if it is not known to be at any length.
        measured: where the crossover was measured.
        home: the engine that is written for this device; None if there is none.
        reasons: why each of the engines does not serve such steps, by its name.
    """

    searched: PreparedStep
    dense: PreparedStep
    wanted: str
    engine: Engine
    least: int
    crossover: int | None
    measured: str
    home: Engine | None = None
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def at(self, keys: int) -> Engine:
        """The engine for a step over so many visible keys."""
        return self.engine if keys >= self.least else DENSE

    def step(self, keys: int) -> PreparedStep:
        """What runs a step over so many visible keys."""
        return self.searched if keys >= self.least else self.dense

    def why_dense(self, keys: int) -> str | None:
        """Why a step over so many keys attends densely; None if it is searched."""
        if self.at(keys).searches:
            return None
        return "auto: dense is faster" if self.wanted == AUTO else "engine is dense"

    def why(self, parts: Parts) -> tuple[str, str]:
        """(name, why) of what searches, for reports."""
        name, remark = self.engine.runs_as(parts)
        if remark:
            return name, f'engine="{self.wanted}", but {remark}'
        if self.wanted == AUTO:
            return name, f"auto, faster from {self.crossover} keys on"
        return name, f'engine="{name}"'


def choose(parts: Parts, request: Request, wanted: str = AUTO) -> Choice:
    """The engine for steps of this kind: the one that is wanted, or the fastest.

    "auto" attends densely below the crossover of the first engine of ENGINES that serves the step and of which one was
    measured on this device, and everywhere where there is none. Plain PyTorch won nowhere on a GPU
    (benchmarks/results/decode_step_h200.json).

    Raises:
        ValueError: the engine that is wanted does not serve them; all reasons are named.
    """
    wanted = engine_name(wanted)
    first, crossover, reasons = DENSE, None, {}
    for engine in ENGINES if parts.searches else ():
        reasons[engine.name] = engine.why_not(parts, request)
        if crossover is None and not reasons[engine.name]:
            crossover = engine.crossover(parts, request)
            first = first if crossover is None else engine
    home = next((engine for engine in ENGINES if engine.device == request.device.type), None)
    engine, least = first, crossover or 0
    if not ever_searches(parts, wanted):
        engine, least = DENSE, 0
    elif wanted != AUTO:
        if reasons[wanted]:
            why = "; ".join(reasons[wanted])
            raise ValueError(f'engine="{wanted}" cannot take this step: {why}; engine="reference" or "auto" can')
        engine, least = next(engine for engine in ENGINES if engine.name == wanted), 0
    steps = engine.prepare(parts, request), DENSE.prepare(parts, request)
    return Choice(*steps, wanted, engine, least, crossover, first.measured(parts, request), home, reasons)


def ever_searches(parts: Parts, wanted: str) -> bool:
    """Whether a composition may search at all, with this engine."""
    return parts.searches and wanted != DENSE.name


def engine_name(wanted: str) -> str:
    """The name of an engine, whichever of its names is given.

    Raises:
        ValueError: there is none of that name.
    """
    name = ALIASES.get(wanted, wanted)
    known = (AUTO, *(engine.name for engine in reversed(ENGINES)))
    if name not in known:
        raise ValueError(f"engine must be one of {', '.join(known)}, got {wanted!r}")
    return name


def serving(parts: Parts, requests: Sequence[Request]) -> tuple[str, ...]:
    """The engines that serve any of these steps, the plainest first; dense attention where nothing is searched."""
    if not parts.searches:
        return (DENSE.name,)
    engines = [engine for engine in reversed(ENGINES) if engine.searches]
    return tuple(e.name for e in engines if not all(e.why_not(parts, request) for request in requests))


def searching(parts: Parts, device: torch.device | str) -> str:
    """The engine that serves any step of a composition on such a device, for those who want a search at any length."""
    kind = torch.device(device)
    request = Request(kind, torch.float32, 1, 1, 1, 1)
    return next(e.name for e in (Host(), Reference()) if not e.why_not(parts, request))
