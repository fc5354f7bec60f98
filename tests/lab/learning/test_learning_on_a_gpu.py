"""Capturing, fitting and judging on a GPU agree with the CPU. Run with pytest -m gpu."""

import json

import pytest
import torch

from hashattn import HashAttention, from_pretrained
from hashattn.lab.evaluation.contenders import contenders
from hashattn.lab.evaluation.run import Settings, run
from hashattn.lab.learning.fit import fit_layers, held_out
from hashattn.lab.learning.shards import Shards
from hashattn.lab.recall import recall_and_mass
from tests.lab.evaluation import small as judged
from tests.lab.learning.shards import make
from tests.lab.learning.small import TEXT, small_capture, small_model
from tests.lab.learning.test_fit import QUICK

pytestmark = pytest.mark.gpu


def test_a_capture_on_a_gpu_is_that_of_the_cpu(tmp_path):
    plain = small_capture(tmp_path / "cpu", model=small_model())
    found = small_capture(tmp_path / "cuda", model=small_model().cuda())
    assert found.layers == plain.layers
    for sequence in plain.sequences:
        first = slice(0, sequence.tokens)  # tokens that are drawn later differ: each device has its own generator
        assert torch.equal(found.tokens(sequence)[first], plain.tokens(sequence)[first])
    for layer in plain.layers:
        for a, b in zip(found.layer(layer), plain.layer(layer), strict=True):
            assert torch.equal(a.positions, b.positions)
            prompt = b.positions < b.prefill
            for x, y in ((a.k[:, : a.prefill], b.k[:, : b.prefill]), (a.q[:, prompt], b.q[:, prompt])):
                assert (x - y).abs().max() < 2**-10 * y.abs().max()  # float16 keeps 11 bits


def test_a_fit_on_a_gpu_finds_what_one_on_the_cpu_finds(tmp_path):
    shards = Shards.open(make(tmp_path / "shards"))
    kept = held_out(shards, QUICK.held_out)
    recalls = {}
    for device in ("cpu", "cuda"):
        out = fit_layers(shards, tmp_path / device, QUICK, device=device, calibrate=True)
        loaded = from_pretrained(out)
        assert loaded.fitted_on["calibration"]
        for layer in loaded.encoder.layers:
            samples = [s for s in shards.layer(layer) if s.name in kept]
            found = recall_and_mass(loaded.encoder.layer(layer), samples, budget=0.05)
            record = json.loads((tmp_path / device / f"layer-{layer:02d}.json").read_text())
            assert found == pytest.approx((record["recall"], record["mass"]), abs=0.01)
            recalls[device, layer] = found[0]
        attn = HashAttention.from_preset("dashkv", pretrained=loaded, dense_layers=(0, 3), engine="reference")
        q, k = (x.unsqueeze(0).cuda() for x in (samples[0].q, samples[0].k))
        assert attn.to("cuda").layer(4)(q.float(), k.float(), k.float()).isfinite().all()
    for layer in loaded.encoder.layers:  # draws differ, what is learned hardly
        assert recalls["cuda", layer] == pytest.approx(recalls["cpu", layer], abs=0.1)


def test_judgements_on_a_gpu_are_those_of_the_cpu():
    entries = contenders(["streaming", "quest"], [0.1], ["none"])
    settings = Settings(
        parts=("perplexity", "retrieval"), tokens=(400,), windows=2, questions=2, tasks=("needle",), sparse=12
    )
    found = {
        device: run(judged.small_model().to(device), judged.small_tokenizer(), TEXT, entries, settings)
        for device in ("cpu", "cuda")
    }
    assert len(found["cpu"]) == len(found["cuda"]) > 8
    for a, b in zip(found["cuda"], found["cpu"], strict=True):
        assert a["contender"] == b["contender"]
        assert a["values"]["nll"] == pytest.approx(b["values"]["nll"], abs=1e-3)
