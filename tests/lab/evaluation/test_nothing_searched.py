"""Cells of an evaluation in which nothing was searched are marked, in tables, JSON and notes."""

import json
from dataclasses import replace

import pytest

from hashattn.cli import main
from hashattn.lab.evaluation.contenders import contenders
from hashattn.lab.evaluation.report import markdown, summarise, unsearched
from hashattn.lab.evaluation.run import Settings, run
from hashattn.lab.workload.texts import read_text
from tests.lab.evaluation.small import save, small_model, small_tokenizer

SHORT = Settings(
    parts=("tensors", "perplexity"), tokens=(320,), windows=2, sparse=6, decoded=4, queries=3
)  # fmt: skip
FORCES = "simhash_topk:sinks=4,recent=64,dense_layers=()"  # 68 keys


@pytest.fixture(scope="module")
def rows():
    text = read_text(None).share(0.5, 0.52)
    records = run(small_model(), small_tokenizer(), text, contenders([FORCES], [0.05, 0.5]), SHORT)
    records += run(
        small_model(), small_tokenizer(), text, contenders([FORCES], [0.5])[1:],
        replace(SHORT, parts=("perplexity",), tokens=(200,), simulate=True),
    )  # fmt: skip
    return summarise(records)


def of(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


@pytest.mark.parametrize("part", ["tensors", "perplexity"])
def test_a_share_below_the_forced_keys_is_marked(rows, part):
    (small,), (large,) = (of(rows, part=part, contender=FORCES, budget=b, tokens=320) for b in (0.05, 0.5))
    assert (small["nothing_searched"], large["nothing_searched"]) == (True, False)
    assert small["figures"]["keys_ranked"]["mean"] == 0
    assert large["figures"]["searched"]["mean"] == 1
    assert 0.5 * 313 - 68 <= large["figures"]["keys_ranked"]["mean"] <= 0.5 * 326 - 68 + 1
    table = markdown(rows)
    assert f"| {FORCES} (NOTHING SEARCHED) | 5%" in table
    assert f"| {FORCES} | 50%" in table
    assert any(note.startswith(f"{FORCES} (NOTHING SEARCHED), budget 5%, 320 tokens") for note in unsearched(rows))


def test_rows_too_short_for_a_centre_are_marked(rows):
    (row,) = of(rows, tokens=200, contender=FORCES)
    assert row["nothing_searched"]
    assert row["figures"]["ratio"]["mean"] == pytest.approx(1, abs=1e-4)  # dense all the way


def test_two_windows_have_no_interval_and_shares_stay_shares(rows):
    for row in rows:
        for name, figure in row["figures"].items():
            assert figure["low"] is figure["high"] is None, name
        assert 0 <= row["figures"].get("relative_mass", {"mean": 0})["mean"] <= 1
    assert " to " not in markdown(of(rows, part="tensors")).split("Means with")[0]


def test_the_command_says_so(tmp_path, capsys):
    model = save(tmp_path / "model")
    status = main([
        "eval", "--model", str(model), "--preset", FORCES, "--budget", "0.05", "--rows", "perplexity",
        "--tokens", "300", "--windows", "1", "--sparse", "4", "--json", str(tmp_path / "out.json"),
    ])  # fmt: skip
    assert status == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "NOTHING SEARCHED" in shown
    assert "note: " in shown and "forced keys take the whole budget" in shown
    assert any("forced keys" in note for note in written["notes"])
    assert [r["nothing_searched"] for r in written["rows"] if r["contender"] == FORCES] == [True]
