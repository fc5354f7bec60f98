"""Pictures of an evaluation: mass against budget, mass against bits, needles by depth and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hashattn.lab import report
from hashattn.lab.evaluation.statistics import mean_interval

Rows = Sequence[dict[str, Any]]


def save_pictures(records: Rows, rows: Rows, folder: str | Path) -> list[Path]:
    """Write the pictures that the figures allow to a folder, which is made if need be; returns their files.

    Args:
        records: of an evaluation.
        rows: the same, summarised.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [row for row in rows if row["part"] == "tensors"]
    needles = [r for r in records if r.get("task") == "needle"]
    wanted: list[tuple[str, bool, Callable[[Any], None]]] = [
        ("mass-budget", _several(tensors, "budget"), lambda axes: _mass(axes, tensors, "budget", ("contender",))),
        ("mass-bits", _several(tensors, "bits"), lambda axes: _mass(axes, tensors, "bits", ("preset", "budget"))),
        ("needle-nll", bool(needles), lambda axes: _needles(axes, needles)),
    ]
    written = []
    for name, there, draw in wanted:
        if there:
            figure = report.figure(8, 5)
            draw(figure.subplots())
            written.append(_save(figure, folder / f"{name}.png"))
    if needles:
        written.append(_save(_grid(needles), folder / "needle-accuracy.png"))
    return written


def _several(rows: Rows, name: str) -> bool:
    return len({row[name] for row in rows if row[name] is not None}) > 1


def _mass(axes: Any, rows: Rows, across: str, by: tuple[str, ...]) -> None:
    """Mass of what the encoder ranks first (of what is kept, where nothing is ranked) against budget or bits."""
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        if row[across] is None:
            continue
        preset = {**row, "preset": row["contender"].partition(":")[0]}
        label = ", ".join([*(str(preset[name]) for name in by), row["dense"], f"{row['tokens']:,} tokens"])
        figures = row["figures"]
        lines.setdefault(label, []).append((row[across], figures.get("ranked_mass", figures["relative_mass"])))
    for label, points in lines.items():
        points.sort(key=lambda point: point[0])
        means = [figure["mean"] for _, figure in points]
        below, above = (
            [0 if f[end] is None else abs(f["mean"] - f[end]) for _, f in points] for end in ("low", "high")
        )
        axes.errorbar([x for x, _ in points], means, yerr=[below, above], marker="o", capsize=3, label=label)
    axes.set_xlabel("budget, share of the keys" if across == "budget" else "bits of a code")
    axes.set_ylabel("attention mass / exact top-k's")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _needles(axes: Any, records: Rows) -> None:
    """NLL of the answer against depth, a line for each contender, mean over lengths, protocols and seeds."""
    for label, chosen in _by_contender(records).items():
        depths = sorted({r["depth"] for r in chosen})
        nll = [mean_interval([r["values"]["nll"] for r in chosen if r["depth"] == depth]).mean for depth in depths]
        axes.plot(depths, nll, marker="o", label=label)
    axes.set_xlabel("depth of the needle (0 is the start of the text)")
    axes.set_ylabel("NLL of the answer, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _grid(records: Rows) -> Any:
    """Accuracy by depth and length, a panel for each contender."""
    groups = _by_contender(records)
    figure = report.figure(max(6, 2.6 * len(groups)), 3.6)
    lengths, depths = sorted({r["tokens"] for r in records}), sorted({r["depth"] for r in records})
    image = None
    for axes, (label, chosen) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        table = [
            [_accuracy([r for r in chosen if (r["depth"], r["tokens"]) == (depth, n)]) for n in lengths]
            for depth in depths
        ]
        image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(label, fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        axes.set_xlabel("tokens")
    figure.axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=figure.axes, label="accuracy")
    return figure


def _accuracy(records: Rows) -> float:
    return sum(r["values"]["correct"] for r in records) / len(records) if records else float("nan")


def _by_contender(records: Rows) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        parts = [
            record["contender"],
            "" if record["budget"] is None else f"{100 * record['budget']:.3g}%",
            record["dense"],
        ]
        groups.setdefault(", ".join(part for part in parts if part), []).append(record)
    return groups


def _save(figure: Any, path: Path) -> Path:
    report.save(figure, path)
    return path
