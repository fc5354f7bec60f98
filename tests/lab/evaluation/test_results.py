"""docs/results.md shows what the results files hold, and nothing else."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("quality_tables", ROOT / "benchmarks/quality_tables.py")
quality_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(quality_tables)
DOCS = (ROOT / "docs/results.md").read_text(encoding="utf-8")


def test_the_docs_end_with_the_tables_of_the_results_files():
    tables = quality_tables.sections(quality_tables.RESULTS)
    assert DOCS.endswith(f"\n{tables}\n")
    for title in quality_tables.TITLES.values():
        assert f"## {title}" in tables
    assert tables.count("### ") == 8


def test_figures_in_the_text_are_in_the_tables():
    text, _, tables = DOCS.partition(f"\n## {quality_tables.TITLES['smollm2-135m']}")
    said = text.partition("## What they say")[2]
    papers = {".861", ".683", ".089"}
    for figure in set(re.findall(r"(?<![\d.])\.\d{3}", said)) - papers:
        rounded = [f"{float(cell):.3f}" for cell in re.findall(r"-?\d\.\d{3,4}", tables)]
        differences = {".002"}  # between two rows
        assert f"0{figure}" in [r.lstrip("-") for r in rounded] or figure in differences, figure


FILES = [f"{kind}_{model}" for kind in ("encoders", "compositions") for model in quality_tables.TITLES]


@pytest.mark.parametrize("name", [*FILES, "peers_gemma-3-270m"])  # docs/recall.md has SmolLM2's peers
def test_results_say_how_they_were_made(name):
    found = json.loads((quality_tables.RESULTS / f"{name}.json").read_text())
    assert re.match(r"python benchmarks/(quality|learned)\.py", found["command"])  # as it was called before
    assert found["device"] and found["date"] and found["versions"]["torch"]
    for row in found["rows"]:
        assert "/" not in row["contender"]
        assert all(figure["n"] >= 6 for figure in row["figures"].values())


def test_the_docs_say_how_often_search_alone_agrees():
    found = json.loads((ROOT / "benchmarks/results/eval_fidelity_smollm2-135m.json").read_text(encoding="utf-8"))
    docs, shown = (ROOT / "docs/lossless.md").read_text(encoding="utf-8"), 0
    for row in found["rows"]:
        if row["budget"] is not None:
            figure, budget = row["figures"]["fidelity"], f"{100 * row['budget']:.3g}%"
            high = "1" if figure["high"] == 1 else f"{figure['high']:.3f}".removeprefix("0")
            mean, low = (f"{figure[name]:.3f}".removeprefix("0") for name in ("mean", "low"))
            assert f"| {budget} | {mean} ({low} to {high}) |" in docs, row["contender"]
            shown += 1
    assert shown == 4
