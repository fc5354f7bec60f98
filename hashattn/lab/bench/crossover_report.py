"""Crossovers: what goes into hashattn/engines/gpus.py, and a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hashattn.engines.gpus import Gpu
from hashattn.lab.bench.report import aligned

NOTE = (
    "The least numbers of keys tried from which a step takes clearly less than dense attention, and microseconds.\n"
    "eager: attn.run from Python, launches and the newest key's encoding included. captured: in a CUDA graph, without."
)


def constants(rows: Iterable[dict[str, Any]]) -> dict[str, int | None]:
    """For each mode the most bytes of any row: from there on a step wins in all of them. None if it does not in one."""
    found: dict[str, int | None] = {}
    for row in rows:
        mode, now = row["mode"], row["bytes"]
        before = found.get(mode, 0)
        found[mode] = None if now is None or before is None else max(now, before)
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A line a crossover, with the times at the least number of keys that wins."""
    lines: list[tuple[str, ...]] = [("mode", "shape", "batch", "per", "bits", "kernels", "wins from", "dense", "step")]
    for row in rows:
        at = next((us for us in row["us"] if us["keys"] == row["keys"]), None)
        wins = ("nowhere", "-", "-") if at is None else (f"{at['keys']:,}", f"{at['dense']:,.1f}", f"{at['step']:,.1f}")
        case = (row["mode"], row["shape"], str(row["batch"]), row["per"], str(row["bits"]), row["kernels"])
        lines.append((*case, *wins))
    return aligned(lines)


def entry(name: str, capability: tuple[int, int], found: dict[str, int | None], source: str) -> str:
    """The line for hashattn/engines/gpus.py."""
    if None in found.values():
        return "There is no line for hashattn/engines/gpus.py: a step did not win everywhere."
    gpu = Gpu(capability, found["eager"] or 0, found["captured"] or 0, source)
    return f"For hashattn/engines/gpus.py:\n    {name!r}: {gpu},"
