"""The demo on the real model, over a short text."""

import json

import pytest

from hashattn.cli import main

pytestmark = pytest.mark.xdist_group("smollm2")


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
def test_the_demo_finds_the_fact_and_shows_what_it_did(tmp_path, capsys):
    out, plot = tmp_path / "demo.json", tmp_path / "reads.png"
    assert main(["demo", "--context", "1000", "--budget", "0.2", "--json", str(out), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    stock, own, hashed = result["contenders"]
    assert [c["name"] for c in (stock, own, hashed)] == ["full attention", "full, our cache", "dashkv_fast"]
    assert stock["correct"]
    assert own["correct"]
    assert stock["answer"] == own["answer"]
    assert hashed["correct"]
    assert stock["keys_read"] == own["keys_read"] == 1.0
    assert 0.2 < hashed["keys_read"] < 0.27  # 20% in 28 of 30 layers
    assert hashed["bytes_per_step"] < 0.35 * stock["bytes_per_step"]
    assert hashed["code_bytes"] > 0
    for words in ("tokens per second", "times as fast", "1.00", "cpu: engine", "^ the fact"):
        assert words in shown
    assert len(result["reads"]) == 30
    assert plot.read_bytes().startswith(b"\x89PNG")
