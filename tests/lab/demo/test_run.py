"""The demo on the real model, over a short text."""

import json

import pytest

from hashattn.cli import main
from hashattn.lab.demo.run import encoder_options, run_demo
from tests.structured import raises_naming


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
    assert hashed["bytes_per_step"] < 0.7 * stock["bytes_per_step"]  # 0.66: each of three heads chooses its 20%
    assert hashed["code_bytes"] > 0
    for words in ("tokens per second", "times as fast", "1.00", "cpu: engine", "^ the fact"):
        assert words in shown
    assert len(result["reads"]) == 30
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
