"""The demo on the real model, over a short text."""

import json

import pytest

from hashattn.cli import main
from hashattn.lab.demo.run import encoder_options, run_demo
from hashattn.lab.demo.story import ANSWER
from tests.structured import raises_naming


def test_the_demo_finds_the_fact_and_shows_what_it_did(tmp_path, capsys):
    out, plot = tmp_path / "demo.json", tmp_path / "reads.png"
    assert main(["demo", "--context", "1000", "--budget", "0.2", "--json", str(out), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    stock, own, hashed = result["contenders"]
    assert [c["name"] for c in (stock, own, hashed)] == ["stock", "full, our cache", "dashkv_fast"]
    assert stock["correct"]
    assert own["correct"]
    assert stock["answer"] == own["answer"]
    assert hashed["correct"]
    assert stock["keys_read"] == own["keys_read"] == 1.0
    assert 0.2 < hashed["keys_read"] < 0.27  # 20% in 28 of 30 layers
    assert hashed["bytes_per_step"] < 0.7 * stock["bytes_per_step"]  # 0.66: each of three heads chooses its 20%
    assert hashed["code_bytes"] > 0
    for name in ("stock", "full, our cache", "dashkv_fast"):
        c = next(c for c in result["contenders"] if c["name"] == name)
        assert c["p99_ms"] >= c["ms"] > 0 and c["tokens_per_second"] == pytest.approx(1e3 / c["ms"])
        assert c["times_own_cache"] == pytest.approx(own["ms"] / c["ms"])
        assert c["times_stock"] == pytest.approx(stock["ms"] / c["ms"])
    for words in ("ms a token, p99", "times full, our cache", "1.00", "cpu: engine", "^ the fact", "They took turns"):
        assert words in shown
    assert shown.count(ANSWER) >= 3  # in each column of the table
    assert len(result["reads"]) == len(result["fact_over_others"]) == 30
    assert result["fact_over_others"][0] == 1.0  # a dense layer
    assert result["fact_over_others_searching"] > 1.5
    assert "14 keys were read" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert result["notes"] == []  # its encoders are fitted
    assert "query_bits=2" in result["composition"]


@pytest.mark.parametrize(
    ("preset", "model", "encoder", "expected"),
    [
        ("dashkv_fast", None, None, "smollm2-135m-fast"),
        ("dashkv_fast", None, "none", None),
        ("dashkv_fast", "another", None, None),
        ("dashkv_fast", "another", "smollm2-135m-fast", "smollm2-135m-fast"),
        ("hata", None, None, None),
        ("simhash_topk", None, None, None),
    ],
)
def test_fitted_encoders_are_taken_where_they_fit(preset, model, encoder, expected):
    found = encoder_options(preset, model, encoder)
    assert found == ({} if expected is None else {"pretrained": expected})


def test_encoders_that_are_not_there_or_do_not_fit_are_refused_before_anything_is_loaded():
    for preset, encoder, words in (
        ("dashkv_fast", "smollm", ["smollm2-135m-fast"]),
        ("hata", "smollm2-135m-fast", ["hata"]),
    ):
        raises_naming(ValueError, *words)(lambda p=preset, e=encoder: run_demo(preset=p, encoder=e))
