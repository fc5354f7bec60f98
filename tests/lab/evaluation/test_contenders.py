"""Contenders: how they are written, what they are made of, what is refused."""

from __future__ import annotations

import pytest
import torch

from hashattn import PCA, HashAttention, ModelFacts, PerLayer, save_pretrained
from hashattn.lab.evaluation.contenders import EXACT, Contender, contenders
from hashattn.presets import budget_options, takes_budget
from hashattn.presets.parsing import parse


def test_a_preset_is_written_with_options():
    assert parse("dashkv") == ("dashkv", {})
    assert parse("simhash_topk:query_bits=4,dense_layers=(0, 1),bits=64,engine=cpu") == (
        "simhash_topk", {"query_bits": 4, "dense_layers": (0, 1), "bits": 64, "engine": "cpu"}
    )  # fmt: skip


def test_exact_topk_comes_along_at_every_budget_and_choice_of_dense_layers():
    found = contenders(["simhash_topk:query_bits=4", "oracle_topk", "full"], [0.05, None], ["preset", "none"])
    assert len({c.key for c in found}) == len(found) == 8
    assert [c.label for c in found] == [EXACT, "simhash_topk:query_bits=4"] * 4
    attn = found[-1].composition(1000)
    assert attn.dense_layers == () and attn.encoder.query_bits == 4
    assert found[1].composition(1000).dense_layers == (0, 1)
    assert Contender("x", "dashkv", dense="0,-1").composition(1000).dense_layers == (0, -1)


@pytest.mark.parametrize(
    ("preset", "keys"),
    [("simhash_topk", 100), ("hata", 100), ("dashkv", 100), ("streaming", 100), ("hashattention", 257), ("sparq", 100)],
)
def test_a_budget_is_the_number_of_keys_forced_ones_included(preset, keys):
    attn = HashAttention.from_preset(preset, **budget_options(preset, 0.05, 2000))
    assert attn.selector.budget(2000) == keys  # hashattention forces 256


def test_options_and_budgets_go_together():
    attn = Contender("x", "hashattention", {"sinks": 4, "recent": 16}, 0.05).composition(2000)
    assert attn.selector.budget(2000) == 100


def test_a_preset_that_takes_no_budget_is_there_once_with_its_own():
    found = contenders(["magicpig", "quest"], [0.05, 0.1], ["none"])
    assert [(c.label, c.budget) for c in found] == [
        (EXACT, 0.05), ("magicpig", None), ("quest", 0.05), (EXACT, 0.1), ("quest", 0.1),
    ]  # fmt: skip
    assert not takes_budget("magicpig") and takes_budget("quest")


def test_encoders_go_to_the_presets_that_have_such_ones(tmp_path):
    k = torch.randn(1, 2, 60, 16, generator=torch.Generator().manual_seed(0))
    facts = ModelFacts("tiny", "llama", 2, (0, 1), 4, 2, 16, None, 97)
    save_pretrained(PerLayer({1: PCA(8).fit(None, k)}, facts), tmp_path / "saved")
    found = contenders(["quest", "loki:components=8"], [0.1], ["preset"], str(tmp_path / "saved"))
    assert [isinstance(c.composition(100).encoder, PerLayer) for c in found] == [False, False, True]


def test_the_seed_draws_other_hyperplanes():
    contender = Contender("simhash_topk", "simhash_topk")
    assert contender.composition(100, seed=3) == contender.composition(100, seed=3)
    assert contender.composition(100, seed=3).encoder != contender.composition(100, seed=4).encoder


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["simhash_topq"], [0.1]), ValueError, "did you mean 'simhash_topk'"),
        ((["simhash_topk:bit=3"], [0.1]), TypeError, "takes no option 'bit'; did you mean 'bits'"),
        ((["simhash_topk:64"], [0.1]), ValueError, "options are written name:option=value"),
        ((["simhash_topk"], [1.5]), ValueError, "budget must be a share above 0 and at most 1, got 1.5"),
        ((["simhash_topk"] * 2, [0.1]), ValueError, "each once, got"),
        ((["simhash_topk"], [0.1], ["some"]), ValueError, 'must be "preset", "none" or numbers'),
        ((["simhash_topk"], [0.1], ["preset"], "smollm2-135m"), ValueError, "'smollm2-135m' is taken by none of the"),
        ((["hata"], [0.1], ["preset"], "smollm2-135m"), ValueError, "'hata' takes SymmetricHash"),
    ],
)
def test_what_cannot_be_judged_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        contenders(*arguments)
