"""How the demo shows its result: a table, a picture in characters, a PNG."""

from __future__ import annotations

import itertools
from pathlib import Path

from hashattn.core.extras import require
from hashattn.lab import report
from hashattn.lab.demo.run import Contender, Result

SHADES = " .:-=+*#%@"


def table(result: Result) -> str:
    """The contenders side by side."""
    names, stock = ["", *(c.name for c in result.contenders)], result.contenders[0].tokens_per_second
    rows = [
        ["answer", *(_shorten(c.answer) for c in result.contenders)],
        ["contains the fact", *(_correct(c) for c in result.contenders)],
        ["tokens per second", *(f"{c.tokens_per_second:.1f}" for c in result.contenders)],
        ["times as fast", *(f"{c.tokens_per_second / stock:.2f}" for c in result.contenders)],
        ["keys read per token", *(f"{c.keys_read:.1%}" for c in result.contenders)],
        ["bytes read per token", *(_megabytes(c.bytes_per_step) for c in result.contenders)],
        ["memory, keys and values", *(_megabytes(c.kv_bytes) for c in result.contenders)],
        ["memory, codes", *(_megabytes(c.code_bytes) if c.code_bytes else "none" for c in result.contenders)],
        ["building the index, once", *(f"{c.indexing_seconds:.2f} s" for c in result.contenders[2:])],
    ]
    rows[-1][1:1] = ["none", "none"]
    return report.aligned([names, *rows], left=True)


def picture(result: Result, *, width: int = 72) -> str:
    """Which keys were read: a line a layer, the text from left to right, darker where query heads read more."""
    lines = [f"keys read by {result.preset}: layers downwards, the text from left to right; darker is more often"]
    for layer, counts in enumerate(result.reads):
        bins = _bins(counts, width)
        peak = max(bins) or 1
        lines.append(f"{layer:>4} |" + "".join(SHADES[round(b / peak * (len(SHADES) - 1))] for b in bins) + "|")
    if result.fact_span is not None:
        column = result.fact_span[0] * width // result.tokens
        lines.append("      " + " " * column + "^ the fact")
    return "\n".join(lines)


def save_plot(result: Result, path: str | Path) -> None:
    """The same picture as a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    colors = require("matplotlib.colors", "demo", "--plot")
    width = min(400, len(result.reads[0]))
    rows = [_bins(counts, width) for counts in result.reads]
    figure = report.figure(11, 0.8 + 0.16 * len(rows))
    axes = figure.subplots()
    place = {"aspect": "auto", "extent": (0, len(result.reads[0]), len(rows) - 0.5, -0.5)}
    shades = {"norm": colors.LogNorm(), "cmap": "magma", "interpolation": "nearest"}
    image = axes.imshow([[1 + value for value in row] for row in rows], **place, **shades)
    if result.fact_span is not None:
        axes.axvspan(*result.fact_span, color="#38d9ff", alpha=0.9, lw=0)
        axes.set_title(f"Keys read by {result.preset} while answering; the fact stands at the blue line", fontsize=10)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="reads per bin, all heads (1 = none)")
    report.save(figure, path)


def _bins(counts: list[int], width: int) -> list[float]:
    """Counts averaged into `width` bins."""
    edges = [i * len(counts) // width for i in range(width + 1)]
    return [sum(counts[a:b]) / max(1, b - a) for a, b in itertools.pairwise(edges)]


def _correct(contender: Contender) -> str:
    return {True: "yes", False: "no", None: "not known"}[contender.correct]


def _shorten(text: str, limit: int = 34) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _megabytes(n: float) -> str:
    return f"{n / 1e6:.1f} MB"
