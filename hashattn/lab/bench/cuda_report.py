"""Results of a benchmark on a GPU: a table and a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hashattn.core.extras import require
from hashattn.core.files import replacing
from hashattn.lab.bench.report import aligned

NOTE = (
    "Microseconds a layer, medians of cold CUDA-graph replays; every case was checked against the reference first.\n"
    "Encoding the query and the newest key is not part of the step. attend = step - scan, the first of two kernels.\n"
    "linear, MLP: the step with its encoder, for queries linear or d-256-256-bits, and with the newest key appended.\n"
    "floor: the larger of the bytes read at the measured bandwidth and the popcounts at the clock's rate.\n"
    "topk: torch.topk over distances made beforehand; FAISS: no graph, its host's part included. Neither attends."
)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a case: times in microseconds a layer, ratios to the fastest dense attention and to the floor."""
    lines: list[tuple[str, ...]] = [(
        "shape", "batch", "keys", "k", "selector", "per", "bits", "kernels", "dense", "us", "step", "x dense",
        "scan", "attend", "floor", "x floor", "linear", "x dense", "MLP", "x dense", "topk", "FAISS",
    )]  # fmt: skip
    for row in rows:
        us = row["us"]
        case = (row["shape"], str(row["batch"]), f"{row['keys']:,}", str(row["k"]), row["selector"], row["per"])
        dense = (str(row["bits"]), row["kernels"], row["dense"], _us(us[row["dense"]]))
        step = (_us(us["step"]), f"{row['speedup']:.2f}")
        stages = (_us(us.get("scan")), _us(us.get("attend")))
        floor = (_us(row["floor_us"]), f"{us['step'] / row['floor_us']:.1f}")
        whole = []
        for name in ("linear", "MLP"):
            faster = row["whole_speedup"].get(name)
            whole += ["-", "-"] if faster is None else [_us(us[name]), f"{faster:.2f}"]
        others = (_us(us.get(name)) for name in ("torch.topk", "FAISS"))
        lines.append((*case, *dense, *step, *stages, *floor, *whole, *others))
    return aligned(lines)


def save_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency against keys, logarithmic: steps, their floors, and the fastest dense attention.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = require("matplotlib.figure", "demo", "--plot").Figure(figsize=(9, 7), layout="constrained")
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
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=130)


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
