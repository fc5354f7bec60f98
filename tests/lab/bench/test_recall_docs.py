"""docs/recall.md shows what benchmarks/results/recall.json holds."""

import importlib.util
import json
from pathlib import Path

import pytest

from hashattn import PRESETS

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("recall_tables", ROOT / "benchmarks/recall_tables.py")
recall_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recall_tables)


def test_the_docs_end_with_the_tables_of_the_results_file():
    tables = recall_tables.sections(recall_tables.read([recall_tables.RESULTS]))
    assert (ROOT / "docs/recall.md").read_text(encoding="utf-8").endswith(f"\n{tables}\n")


def test_every_preset_was_measured_on_both_data_sets():
    found = json.loads(recall_tables.RESULTS.read_text(encoding="utf-8"))
    assert found["command"].startswith("hashattn bench recall")
    for data in found["settings"]["data"]:
        assert {row["preset"] for row in found["rows"] if row["data"] == data} == set(PRESETS)


@pytest.mark.parametrize(("name", "rows"), [("peers", 11), ("looking_back", 3)])
def test_the_docs_show_what_peers_do_to_predictions(name, rows):
    found = json.loads((ROOT / f"benchmarks/results/eval_{name}_smollm2-135m.json").read_text(encoding="utf-8"))
    docs = (ROOT / "docs/recall.md").read_text(encoding="utf-8")
    shown = 0
    for row in found["rows"]:
        if (above := row["figures"].get("ratio_above_exact")) is not None:
            assert f"| {row['figures']['ratio']['mean']:.3f} ± " in docs
            assert f"| {above['mean']:+.4f} ± {(above['high'] - above['low']) / 2:.4f} |" in docs
            shown += 1
    assert shown == rows
    assert f"\n{recall_tables.predictions()}\n" in docs
