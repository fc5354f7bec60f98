"""Results of comparing presets: tables and a Pareto picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hashattn.engines.choose import DENSE
from hashattn.lab import report
from hashattn.lab.report import Row

_SHARES, _COSTS = ("recall", "mass", "/ exact", "error"), ("B a key", "scan", "read", "us", "dense", "x dense")
HEAD = ("preset", "weights", "keys read", *_SHARES, *_COSTS, "best")
NOTE = (
    "Means over layers, queries and query heads; presets without a budget keep their own number of keys.\n"
    "weights: of the encoder: shipped with the library, or fitted or trained here, on another text than is judged.\n"
    "recall, / exact: against as many exact top keys: the share found, and the mass kept over theirs. error: of the\n"
    "output, against float64. B a key: codes beside a key and head. scan, read: bytes read to rank, and in all, over\n"
    "what dense attention reads (bfloat16). us: median of a decode step of a layer, its key encoded;\n"
    "dense: the fastest full attention, right after. best: of those that search, none keeps more of exact top-k's\n"
    "mass with as few bytes a key (B), bytes read (R), microseconds (T)."
)
_LEAST = 1e-3  # of a picture's missed mass
COSTS = {"B": "key_bytes", "R": "read_bytes", "T": "us"}


def table(rows: Sequence[Row]) -> str:
    """A block for each data set, those that keep most first."""
    blocks = []
    for data in dict.fromkeys(row["data"] for row in rows):
        block = [HEAD, *(cells(row, rows) for row in sorted_rows(rows, data))]
        first = next(row for row in rows if row["data"] == data)
        shape = f"{first['q_heads']}/{first['kv_heads']} heads of {first['head_dim']}, {first['keys']:,} keys"
        blocks.append(f"{data}: {shape}\n{report.aligned(block)}")
    return "\n\n".join(blocks)


def sorted_rows(rows: Sequence[Row], data: str) -> list[Row]:
    """The rows of a data set, those that keep most first."""
    return sorted((row for row in rows if row["data"] == data), key=lambda row: -row["relative_mass"])


def cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """One line, as HEAD names it."""
    others = [other for other in rows if other["data"] == row["data"]]
    best = "".join(letter for letter, cost in COSTS.items() if on_front(row, others, cost))
    budget = "" if row["budget"] is not None else " (own budget)"
    shares = (f"{row[name] / row['dense_bytes']:.3f}" for name in ("scan_bytes", "read_bytes"))
    kept = (f"{row[name]:.3f}" for name in ("recall", "mass", "relative_mass", "output_error"))
    who = row["preset"] + budget, row["weights"] or "-", f"{row['keys_read']:.1%}"
    times = f"{row['us']:,.0f}", f"{row['dense_us']:,.0f}", f"{row['dense_us'] / row['us']:.2f}"
    return (*who, *kept, f"{row['key_bytes']:.1f}", *shares, *times, best or "-")


def on_front(row: Row, rows: Sequence[Row], cost: str) -> bool:
    """Whether none of the rows that search keeps more of exact top-k's mass at no more cost, or as much at less."""
    if row["engine"] == DENSE.name:
        return False
    mine = row["relative_mass"], -row[cost]
    return not any(
        other["relative_mass"] >= mine[0] and -other[cost] >= mine[1] and (other["relative_mass"], -other[cost]) != mine
        for other in rows
        if other["engine"] != DENSE.name
    )


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Mass missed against bytes a key, bytes read and microseconds, with the fronts: three panels for each data set.

    Raises:
        ImportError: matplotlib is missing.
    """
    names = [*dict.fromkeys(row["data"] for row in rows)]
    figure = report.figure(17, 6 * len(names))
    labels = {"key_bytes": "bytes of codes a key", "read_bytes": "bytes read a step / dense", "us": "us a step"}
    for line, data in zip(figure.subplots(len(names), 3, squeeze=False, sharey="row"), names, strict=True):
        chosen = sorted_rows(rows, data)
        for axes, cost in zip(line, COSTS.values(), strict=True):
            _panel(axes, chosen, cost)
            axes.set(xlabel=labels[cost], title=data)
        line[0].set(yscale="log", ylabel="attention mass that is missed, of exact top-k's")
        line[0].invert_yaxis()  # up is better
        line[-1].legend(
            loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=7, labelspacing=0.2, title="red here: best by us"
        )
    report.save(figure, path, dpi=110)


def _panel(axes: Any, rows: Sequence[Row], cost: str) -> None:
    """Rows in the order of the table, by their number there; red are those on the front."""
    scale, front = rows[0]["dense_bytes"] if cost == "read_bytes" else 1, []
    for i, row in enumerate(rows, 1):
        point = row[cost] / scale, max(_LEAST, 1 - row["relative_mass"])
        best = on_front(row, rows, cost)
        front += [point] * best
        colour = "C3" if best else "C0"
        axes.plot(*point, "o" if best else "x", color=colour, label=f"{i} {row['preset']}")
        axes.annotate(str(i), point, xytext=(3, 3), textcoords="offset points", fontsize=8, color=colour)
    if front:
        axes.step(*zip(*sorted(front), strict=True), where="post", color="C3", alpha=0.5)
    if cost == "key_bytes":
        axes.set_xscale("symlog", linthresh=1)  # some keep nothing
    else:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
