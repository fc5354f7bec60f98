"""Results of a benchmark: a table, and a file that says how they came about."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

from hashattn.core.files import replacing
from hashattn.core.version import __version__


def environment(command: list[str], device: str = "cpu") -> dict[str, Any]:
    """Command, date, device and versions. device: "cpu" or "cuda", what ran."""
    gpu = {"triton": _version("triton"), "cuda": torch.version.cuda} if device == "cuda" else {}
    faiss = _version("faiss-gpu" if device == "cuda" else "faiss-cpu")
    return {
        "command": shlex.join(["hashattn", *command]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": {
            "hashattn": __version__, "torch": torch.__version__, "numpy": numpy.__version__,
            "faiss": faiss, "python": platform.python_version(), **gpu,
        },
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(rows: list[dict[str, Any]]) -> str:
    """A line a case: times in microseconds a layer, ratios to the fastest dense attention and to the byte floor."""
    head = (
        "shape", "threads", "keys", "k", "dense", "step", "x dense", "encode q", "encode k", "floor", "x floor",
        "auto runs", "auto / dense",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        us = row["us"]
        start = (row["shape"], row["threads"], f"{row['keys']:,}", row["k"], f"{us[row['dense']]:,.0f}")
        end = (row["auto_engine"], f"{row['auto_cost']:.2f}")
        cells: tuple[str, ...] = ("-",) * 6
        if "step" in us:
            encode = (f"{us['encode query']:.0f}", f"{us['encode key']:.0f}")
            floor = (f"{row['floor_us']:,.0f}", f"{us['step'] / row['floor_us']:.1f}")
            cells = (f"{us['step']:,.0f}", f"{row['speedup']:.2f}", *encode, *floor)
        lines.append(tuple(map(str, (*start, *cells, *end))))
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Cells in columns, right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def say(line: str) -> None:
    """A remark beside the results."""
    print(line, file=sys.stderr, flush=True)
