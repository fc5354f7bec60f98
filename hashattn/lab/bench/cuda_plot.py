"""A picture of decode steps on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from hashattn.lab import report
from hashattn.lab.report import Row


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Latency against keys, logarithmic: steps, their floors, and the fastest dense attention.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = report.figure(9, 7)
    axes = figure.subplots()
    steps: dict[str, list[tuple[int, float, float]]] = {}
    dense: dict[str, dict[int, float]] = {}
    for row in rows:
        name = f"{row['shape']}, batch {row['batch']}"
        step = (row["keys"], row["us"]["step"], row["floor_us"])
        steps.setdefault(f"{name}, {row['selector']} k={row['k']} per {row['per']}", []).append(step)
        own = dense.setdefault(f"{name}, fastest dense", {})
        own[row["keys"]] = min(own.get(row["keys"], float("inf")), row["us"][row["dense"]])
    for name, points in steps.items():
        keys, times, least = zip(*sorted(points), strict=True)
        (line,) = axes.plot(keys, times, "o-", label=name)
        axes.plot(keys, least, "^:", color=line.get_color(), alpha=0.6)
    for (name, fastest), style in zip(dense.items(), itertools.cycle(("ks--", "kd-.", "kv:")), strict=False):
        axes.plot(*zip(*sorted(fastest.items()), strict=True), style, label=name)
    axes.plot([], [], "^:", color="gray", label="floor of the same colour's step")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="keys", ylabel="microseconds a layer")
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    report.save(figure, path)
