"""How results are told: where they come from, tables for people and for Markdown, JSON, pictures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

from hashattn.core.extras import require
from hashattn.core.files import replacing
from hashattn.core.version import __version__
from hashattn.lab.checks import STDOUT

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]  # title, and the cell of a row


def environment(command: Sequence[str], device: str = "cpu") -> dict[str, Any]:
    """Command, date, device and versions. device: "cpu" or "cuda", what ran."""
    gpu = device == "cuda"
    versions = {
        "hashattn": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "faiss": _version("faiss-gpu" if gpu else "faiss-cpu"),
        "python": platform.python_version(),
    }
    return {
        "command": shlex.join(["hashattn", *command]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": versions | ({"triton": _version("triton"), "cuda": torch.version.cuda} if gpu else {}),
    }


def cpu_name() -> str:
    """The processor's model, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """A line a row, in aligned columns."""
    return aligned(lines(rows, columns))


def lines(rows: Iterable[Row], columns: Sequence[Column]) -> list[list[str]]:
    """The titles, and the cells of each row."""
    return [[title for title, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]


def aligned(lines: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Cells in columns: right-aligned; or left-aligned, with a rule below the first line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if left:
        lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    put = str.ljust if left else str.rjust
    return "\n".join("  ".join(map(put, line, widths)).rstrip() for line in lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The same as a table of Markdown."""
    told = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([told[0], f"|{'---|' * len(lines[0])}", *told[1:]])


def write_json(path: str | Path, data: Any) -> None:
    """Write to a file, there whole or not at all; or to standard output for "-"."""
    text = json.dumps(data, indent=1) + "\n"
    if str(path) == STDOUT:
        sys.stdout.write(text)
    else:
        write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Write to a file, there whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def for_people(*targets: str | None) -> Callable[..., None]:
    """print(), to standard error if standard output is one of the targets, for programs to read."""
    stream = sys.stderr if STDOUT in targets else sys.stdout

    def say(*words: object) -> None:
        print(*words, file=stream)

    return say


def remark(line: str) -> None:
    """Say beside the results what is being done."""
    print(line, file=sys.stderr, flush=True)


def figure(width: float, height: float) -> Any:
    """An empty picture, in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    module = require("matplotlib.figure", "demo", "--plot")
    return module.Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | Path, dpi: int = 130) -> None:
    """Write a picture, there whole or not at all."""
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=dpi)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
