"""Selectors that look back at the prompt's attention, attached to models whose prefill is dense."""

import pytest
import torch
from transformers import DynamicCache

from hashattn import ExactAttend, HashAttention, HeavyHitters, ObservationWindow, Sink, pyramid
from tests.integrations.models import LENGTH, NEW, cache_of, make, prompt, write

SELECTORS = {
    "heavy hitters": HeavyHitters(k=20),
    "window": ObservationWindow(k=20, window=8),
    "pyramid": ObservationWindow(shares=pyramid(4, 0.2), window=8),
    "joined": Sink(2) | HeavyHitters(share=0.2),
}
EVERYTHING = {"heavy hitters": HeavyHitters(share=1.0), "window": ObservationWindow(share=1.0, window=8)}


def composed(selector):
    return HashAttention(selector=selector, attend=ExactAttend(), engine="reference")


@pytest.fixture
def llama():
    return make()


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_budget_of_everything_writes_what_the_model_writes(llama, name):
    expected = write(llama, prompt(), num_beams=2)
    with composed(EVERYTHING[name]).attach(llama):
        assert torch.equal(write(llama, prompt(), num_beams=2), expected)


@pytest.mark.parametrize("name", ["pyramid", "joined"])
def test_left_padded_rows_write_what_they_write_alone(llama, name):
    inputs = prompt(3, (0, 9, 30))
    with composed(SELECTORS[name]).attach(llama):
        together = write(llama, inputs, pad_token_id=0, eos_token_id=None)
        for row, n in enumerate((0, 9, 30)):
            alone = {key: x[row : row + 1, n:] for key, x in inputs.items()}
            assert torch.equal(write(llama, alone, pad_token_id=0, eos_token_id=None)[0], together[row, n:])


@pytest.mark.parametrize("name", SELECTORS)
def test_the_prompt_votes_and_decoding_reads_what_it_voted_for(llama, name):
    with composed(SELECTORS[name]).attach(llama) as handle:
        cache = DynamicCache(config=llama.config)
        out = write(llama, prompt(1, (0,)), cache, return_dict_in_generate=True, eos_token_id=None)
        report = handle.report()
        caches = [layer.kv for layer in cache_of(out).layers]
        assert len(caches) == 4
        for kv in caches:
            heavy = "Heavy" in repr(SELECTORS[name])
            assert len(kv.votes) == (LENGTH + NEW - 1 if heavy else LENGTH)
            dropped = (kv.votes.of(LENGTH, kv.keys) == -torch.inf).float().mean()
            assert 0.5 < dropped < 0.99
    for row in report.layers:
        assert row.dense == {"prefill": 1}
        assert row.sparse == NEW - 1
    assert report.sparse_keys_read < 0.4


@pytest.mark.parametrize("name", SELECTORS)
def test_simulated_decoding_chooses_again_with_each_block(llama, name, monkeypatch):
    monkeypatch.setattr("hashattn.integrations.transformers.simulate.block_size", lambda batch, keys: 16)
    ids = prompt(1)["input_ids"]
    with torch.no_grad():
        exact = llama(input_ids=ids).logits
        with composed(SELECTORS[name]).attach(llama, simulate=True) as handle:
            found = llama(input_ids=ids).logits
            read = handle.report().sparse_keys_read
    assert found.isfinite().all()
    assert torch.allclose(found[:, :16], exact[:, :16], atol=1e-4)  # nobody has voted yet
    assert not torch.allclose(found[:, 40:], exact[:, 40:], atol=1e-4)
    assert read < 0.9
