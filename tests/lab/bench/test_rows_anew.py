"""Rows that are measured anew take the place of the old ones, and nothing else changes."""

import importlib.util
import json
from pathlib import Path

from tests.structured import raises_naming

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("rows_anew", ROOT / "benchmarks/rows_anew.py")
rows_anew = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(rows_anew)
COMMON = {"settings": {"tokens": [4096]}, "model": "m", "text": "t", "sha256": "s", "share": [0, 1], "dtype": "float32"}


def result(date, *rows, notes=(), **changes):
    held = [{"contender": name, "budget": budget, "figure": date} for name, budget in rows]
    return {**COMMON, "date": date, "device": "a machine", "versions": {"torch": "2"}, "notes": [*notes], **changes,
            "rows": held}  # fmt: skip


OLD = result("old", ("full attention", None), ("oracle_topk", 0.05), ("a", 0.05), ("b", 0.05), ("a", 0.1), notes=["n"])


def test_new_rows_stand_where_the_old_ones_stood_and_others_stay(tmp_path):
    paths = [tmp_path / name for name in ("old.json", "a.json", "c.json")]
    fresh = result("new", ("full attention", None), ("oracle_topk", 0.05), ("a", 0.05), ("a", 0.1))
    for path, held in zip(paths, (OLD, fresh, result("later", ("c", 0.05))), strict=True):
        path.write_text(json.dumps(held))
    rows_anew.main([str(path) for path in paths])
    found = json.loads(paths[0].read_text())
    assert [(r["contender"], r["budget"], r["figure"]) for r in found["rows"]] == [
        ("full attention", None, "old"), ("oracle_topk", 0.05, "old"), ("a", 0.05, "new"), ("a", 0.1, "new"),
        ("b", 0.05, "old"), ("c", 0.05, "later"),
    ]  # fmt: skip
    assert found["notes"] == [
        "n", "a: measured anew on new, a machine, torch 2", "c: measured anew on later, a machine, torch 2",
    ]  # fmt: skip
    assert {k: v for k, v in found.items() if k not in ("rows", "notes")} == {
        k: v for k, v in OLD.items() if k not in ("rows", "notes")
    }
    again = rows_anew.anew(rows_anew.anew(OLD, fresh), result("third", ("a", 0.05)))
    assert again["notes"] == ["n", "a: measured anew on third, a machine, torch 2"]


def test_results_of_other_settings_are_refused_and_leave_the_file_alone(tmp_path):
    for changes, words in (({"settings": {"tokens": [8]}}, ["settings", "4096"]), ({"model": "x"}, ["model", "'x'"])):
        raises_naming(ValueError, *words)(
            lambda changes=changes: rows_anew.anew(OLD, result("new", ("a", 1), **changes))
        )
    raises_naming(ValueError, "full attention")(lambda: rows_anew.anew(OLD, result("new", ("oracle_topk", 0.05))))


def test_seeds_that_were_measured_apart_are_summed_up():
    def seed(number, ratio):
        record = {"part": "perplexity", "contender": "a", "budget": 0.05, "values": {"ratio": ratio}}
        settings = {"tokens": [4096], "seeds": [number]}
        return result("new", ("a", 0.05), settings=settings) | {"records": [record]}

    (whole,) = rows_anew.together([seed(1, 1.5), seed(0, 1.25)])
    assert whole["settings"] == {"tokens": [4096], "seeds": [0, 1]}
    (row,) = whole["rows"]
    assert (row["contender"], row["figures"]["ratio"]["mean"], row["figures"]["ratio"]["n"]) == ("a", 1.375, 2)
    other = seed(2, 1.0) | {"settings": {"tokens": [8], "seeds": [2]}}
    raises_naming(ValueError, "settings", "[8]")(lambda: rows_anew.together([seed(0, 1.0), other]))
