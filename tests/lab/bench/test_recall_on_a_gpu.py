"""`hashattn bench recall --device cuda`: captured steps on the same queries. Run with pytest -m gpu."""

import json

import pytest

from hashattn.cli import main

pytestmark = pytest.mark.gpu
PRESETS = ["simhash_topk", "dashkv_momentum", "streaming", "full", "magicpig"]


def test_steps_that_are_served_are_replayed_and_others_run(tmp_path):
    small = ["bench", "recall", "--device", "cuda", "--data", "synthetic", "--tokens", "2048", "--queries", "24"]
    assert main([*small, "--presets", *PRESETS, "--budget", "0.15", "--out", str(tmp_path / "found.json")]) == 0
    rows = {row["preset"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert [*rows] == PRESETS
    assert all(min(row["us"], row["dense_us"]) > 0 for row in rows.values())
    assert all(("p99_us" in rows[name]) == (name != "magicpig") for name in PRESETS)
    assert rows["simhash_topk"]["us"] <= rows["simhash_topk"]["p99_us"] <= rows["simhash_topk"]["largest_us"]
    assert rows["simhash_topk"]["keys_read"] == pytest.approx(0.15, abs=0.01)
    assert rows["full"]["relative_mass"] == 1
