"""An evaluation's records, summed up: intervals, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hashattn.lab import report
from hashattn.lab.evaluation.statistics import Interval, mean_interval, share_interval

GROUP = ("part", "task", "protocol", "tokens", "contender", "budget", "dense", "bits")
SUCCESSES = ("correct",)  # zeros and ones
_KEPT = ("keys_read", "sparse_keys_read", "searched", "recall", "mass", "relative_mass", "ranked_recall")
SHARES = (*_KEPT, "ranked_mass", "recall_at_100", "recall_prefill", "recall_decoded", "f1", "match", "fidelity")
NOTE = (
    "Means with 95% confidence intervals over windows or questions and seeds: Student's t, and Wilson's for "
    "accuracies. Keys read counts every key whose value is read, forced keys and the middle tier included; bytes are "
    "keys, values, norms and codes a token, over all layers. Fewer than three windows or questions have no interval. "
    "Keys ranked are those that a head keeps beyond the forced ones, mean over the positions that were searched."
)
TITLES = {
    "keys_read": "keys read",
    "keys_ranked": "keys ranked",
    "sparse_keys_read": "in sparse layers",
    "recall": "recall@k",
    "mass": "mass kept",
    "relative_mass": "mass / exact top-k's",
    "output_error": "output error",
    "ranked_recall": "encoder's recall",
    "ranked_mass": "encoder's mass / exact",
    "recall_at_100": "recall@100",
    "recall_prefill": "recall, prefill keys",
    "recall_decoded": "recall, decoded keys",
    "drift": "drift",
    "ratio": "perplexity ratio",
    "ratio_above_exact": "minus exact top-k's",
    "bytes_read": "MB a token",
    "correct": "accuracy",
    "nll": "NLL",
    "nll_above_full": "NLL above full",
    "nll_above_exact": "above exact top-k",
    "f1": "F1",
    "match": "match",
    "fidelity": "fidelity",
}
_READ = ("keys_read", "keys_ranked")
_RANKED = ("ranked_recall", "ranked_mass", "recall_at_100")
COLUMNS = {
    "tensors": (*_READ, "recall", "relative_mass", "output_error", *_RANKED, "drift"),
    "perplexity": ("ratio", "ratio_above_exact", *_READ, "sparse_keys_read", "bytes_read"),
    "fidelity": ("fidelity", *_READ, "bytes_read"),
    "retrieval": ("correct", "nll", "nll_above_full", "nll_above_exact", *_READ, "bytes_read"),
    "benchmarks": ("f1", "match", *_READ, "bytes_read"),
}


def summarise(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each part, task, protocol, length and contender: an interval for each figure.

    Returns:
        Dicts of GROUP's names, "figures": name -> {mean, low, high, n}, and "nothing_searched".
    """
    groups: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for record in records:
        figures = groups.setdefault(tuple(record.get(name) for name in GROUP), {})
        for name, value in record["values"].items():
            figures.setdefault(name, []).append(value)
    return [
        dict(zip(GROUP, key, strict=True))
        | {"figures": {name: _interval(name, each).as_dict() for name, each in values.items()}}
        | {"nothing_searched": "searched" in values and not any(values["searched"])}
        for key, values in groups.items()
    ]


def _interval(name: str, values: Sequence[float]) -> Interval:
    return share_interval(values) if name in SUCCESSES else mean_interval(values, shares=name in SHARES)


def unsearched(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A note on each contender for which nothing was searched somewhere: its figures there say nothing of it."""
    notes = []
    for row in rows:
        if row["nothing_searched"]:
            who, budget, _ = _who(row)
            length = f", {row['tokens']:,} tokens" if row["tokens"] else ""
            notes.append(
                f"{who}, budget {budget}{length}: forced keys take the whole budget, or rows are too short to be "
                "indexed: the figures are those of forced keys (or of full attention), whatever the encoder; take a "
                "larger budget or longer texts"
            )
    return [*dict.fromkeys(notes)]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each part, task, protocol and length."""
    lines: list[str] = []
    tables: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault((row["part"], row["task"], row["protocol"], row["tokens"]), []).append(row)
    for (part, task, protocol, tokens), members in tables.items():
        length = [f"{tokens:,} tokens"] if tokens else []
        lines += [f"### {', '.join([task or part, *([protocol] if protocol else []), *length])}", ""]
        columns = [c for c in COLUMNS[part] if any(c in row["figures"] for row in members)]
        head = ["", "budget", "dense layers", *(TITLES[c] for c in columns)]
        cells = [[*_who(row), *(_cell(c, row["figures"].get(c)) for c in columns)] for row in members]
        lines += [report.markdown([head, *cells]), ""]
    return "\n".join([*lines, NOTE])


def _who(row: dict[str, Any]) -> tuple[str, str, str]:
    budget = "" if row["dense"] == "" else "own" if row["budget"] is None else f"{100 * row['budget']:.3g}%"
    return row["contender"] + (" (NOTHING SEARCHED)" if row["nothing_searched"] else ""), budget, row["dense"]


def _cell(name: str, figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    scale, digits = (1e-6, 2) if name == "bytes_read" else (1.0, 2 if name in ("correct", "f1", "match") else 4)
    mean = f"{figure['mean'] * scale:.{digits}f}"
    if name == "keys_read" or name == "sparse_keys_read":
        return f"{figure['mean']:.1%}"
    if name == "keys_ranked":
        return f"{figure['mean']:.1f}"
    if figure["low"] is None or name == "bytes_read":
        return mean
    return f"{mean} ({figure['low'] * scale:.{digits}f} to {figure['high'] * scale:.{digits}f})"
