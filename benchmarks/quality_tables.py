"""Tables in Markdown, and a picture, of what benchmarks/quality.py has written to benchmarks/results.

python benchmarks/quality_tables.py [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from hashattn.lab import report
from hashattn.lab.report import Row, markdown

RESULTS = Path(__file__).parent / "results"
# recipe or preset: what is scored, bytes of a key's code
ENCODERS = {
    "simhash_topk": ("SimHash", 16),
    "simhash_topk:query_bits=4": ("SimHash, query of 4 planes", 16),
    "dashkv": ("DASH-KV as published", 16),
    "dashkv-symmetric": ("DASH-KV's losses, symmetric", 16),
    "symmetric": ("ranking, symmetric", 16),
    "linear": ("ranking, linear query", 16),
    "asymmetric": ("ranking, query MLP", 16),
    "asymmetric-32": ("ranking, query MLP, 32 bits", 8),
    "asymmetric-64": ("ranking, query MLP, 64 bits", 8),
    "asymmetric-256": ("ranking, query MLP, 256 bits", 32),
    "planes": ("ranking, linear query of 4 planes", 16),
    "planes-2": ("ranking, linear query of 2 planes", 16),
    "bias": ("ranking, linear query, 120 bits + bias", 16),
    "bias-heads": ("the same, weights per KV head", 16),
    "bias-64": ("ranking, linear query, 56 bits + bias", 8),
    "itq": ("ITQ, query of 8 planes", 16),
    "pq-16": ("PQ", 16),
}
TITLES = {"smollm2-135m": "SmolLM2-135M-Instruct, layers 2 to 29", "gemma-3-270m": "Gemma-3-270M, layers 5, 11 and 17"}


def read(kind: str, model: str, folder: Path) -> list[Row]:
    """The summarised rows of a results file; none if there is no such file."""
    path = folder / f"{kind}_{model}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def recipe_of(contender: str) -> str:
    """Which of ENCODERS a contender is."""
    return contender.partition("pretrained=")[2].partition(",")[0] or contender


def named(contender: str) -> str:
    """Without the encoders that it takes, for a preset that takes its own."""
    return re.sub(r"[:,]pretrained=[^,]*", "", contender)


def mean(row: Row, name: str, digits: int = 3) -> str:
    """A figure with half the width of its confidence interval."""
    figure = row["figures"].get(name)
    if figure is None:
        return ""
    shown = f"{figure['mean']:.{digits}f}"
    return shown if figure["low"] is None else f"{shown} ± {(figure['high'] - figure['low']) / 2:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return markdown([head, *rows])


def encoders(model: str, folder: Path) -> str:
    """What each encoder finds by its distances alone, at 5% of the keys."""
    rows = {
        recipe_of(row["contender"]): row for row in read("encoders", model, folder) if row["contender"] != "oracle_topk"
    }
    shown = [
        [label, str(size), *(mean(rows[name], f) for f in ("ranked_mass", "ranked_recall", "recall_at_100", "drift"))]
        for name, (label, size) in ENCODERS.items()
        if name in rows
    ]
    return table(["encoder", "bytes a key", "mass / exact top-k's", "recall@5%", "recall@100", "drift"], shown)


def compositions(model: str, budget: float, folder: Path, kind: str = "compositions") -> str:
    """What presets do to a model's predictions and answers, at a budget; `kind` "peers" for those of others."""
    found: dict[str, dict[str, Row]] = {}
    for row in read(kind, model, folder):
        if row["budget"] in (budget, None):
            place = row["part"] if row["part"] == "perplexity" else f"{row['task']} {row['protocol']}"
            found.setdefault(row["contender"], {})[place] = row
    shown = []
    for contender, parts in found.items():
        text = parts.get("perplexity")
        sparse = {task: row for place, row in parts.items() if "sparse" in place for task in [place.split()[0]]}
        if text is None or contender == "full attention":
            continue
        shown.append(
            [
                contender.replace("pretrained=", "") if kind == "compositions" else named(contender),
                mean(text, "ratio"),
                mean(text, "ratio_above_exact", 4),
                *(mean(sparse[task], "correct", 2) if task in sparse else "" for task in ("needle", "multikey")),
                mean(sparse["multikey"], "nll_above_exact") if "multikey" in sparse else "",
                f"{text['figures']['keys_read']['mean']:.1%}",
                f"{text['figures']['bytes_read']['mean'] / 1e6:.1f}",
            ]
        )
    head = ["preset", "perplexity ratio", "minus exact top-k's", "needle", "multi-key", "its NLL above exact top-k's"]
    return table([*head, "keys read", "MB a token"], shown)


def picture(path: Path, models: Sequence[str], folder: Path) -> None:
    """What each encoder keeps and finds, a panel for each model."""
    figure = report.figure(11, 4.6)
    for axes, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        rows = {recipe_of(row["contender"]): row["figures"] for row in read("encoders", model, folder)}
        shown = [name for name in reversed(ENCODERS) if name in rows]
        for figure_name, label, marker in (
            ("ranked_mass", "mass / exact top-k's", "o"),
            ("ranked_recall", "recall", "s"),
        ):
            axes.plot([rows[name][figure_name]["mean"] for name in shown], range(len(shown)), marker, label=label)
        axes.set_yticks(
            range(len(shown)), [f"{ENCODERS[name][0]} ({ENCODERS[name][1]} B)" for name in shown], fontsize=8
        )
        axes.set(title=TITLES[model], xlabel="at 5% of the keys", xlim=(0, 1))
        axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    report.save(figure, path)


def sections(folder: Path) -> str:
    """All tables of the models that have results."""
    parts = []
    for model, title in TITLES.items():
        if read("encoders", model, folder):
            parts += [f"## {title}", "### What the codes find", encoders(model, folder)]
        if read("compositions", model, folder):
            for budget in (0.05, 0.1):
                parts += [f"### End to end, {budget:.0%} of the keys", compositions(model, budget, folder)]
        if read("peers", model, folder):
            for budget in (0.05, 0.1):
                parts += [f"### Peers, {budget:.0%} of the keys", compositions(model, budget, folder, "peers")]
    return "\n\n".join(parts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write the picture to this file")
    chosen = parser.parse_args()
    print(sections(chosen.results))
    if chosen.plot:
        models = [model for model in TITLES if read("encoders", model, chosen.results)]
        picture(chosen.plot, models, chosen.results)


if __name__ == "__main__":
    main()
