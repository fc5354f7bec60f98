"""Selectors that look back at the prompt's attention, attached to models whose prefill is dense."""

import pytest
import torch
from transformers import DynamicCache

from hashattn import ExactAttend, HashAttention, HeavyHitters, ObservationWindow, Sink, pyramid
from tests.integrations.models import CACHE, LENGTH, NEW, cache_of, make, prompt, write

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
            assert len(kv.attention_sums) == (LENGTH + NEW - 1 if heavy else LENGTH)
            dropped = (kv.attention_sums.of(LENGTH, kv.keys) == -torch.inf).float().mean()
            assert 0.5 < dropped < 0.99
    for row in report.layers:
        assert row.dense == {"prefill": 1}
        assert row.sparse == NEW - 1
    assert report.sparse_keys_read < 0.4


@pytest.mark.parametrize("name", SELECTORS)
def test_simulated_decoding_chooses_with_each_query_or_block(llama, name, monkeypatch):
    monkeypatch.setattr("hashattn.integrations.attached.simulate.block_size", lambda batch, keys: 16)
    ids = prompt(1)["input_ids"]
    with torch.no_grad():
        exact = llama(input_ids=ids).logits
        with composed(SELECTORS[name]).attach(llama, simulate=True) as handle:
            found = llama(input_ids=ids).logits
            read = handle.report().sparse_keys_read
    assert found.isfinite().all()
    if SELECTORS[name].one_by_one:
        with composed(SELECTORS[name]).attach(llama), torch.no_grad():
            cache = DynamicCache(config=llama.config)
            exact = torch.cat([llama(input_ids=ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(24)], 1)
        assert torch.allclose(found[:, :24], exact, atol=1e-4)
        return
    assert torch.allclose(found[:, :16], exact[:, :16], atol=1e-4)  # nobody has voted yet
    assert not torch.allclose(found[:, 40:], exact[:, 40:], atol=1e-4)
    assert read < 0.9


def drafts(model, seed):
    """A function for generate's `custom_generate`: greedy decoding that checks and crops rejected drafts in between."""

    def generate(model, input_ids, **kwargs):
        cache, generator = kwargs[CACHE], torch.Generator().manual_seed(seed)
        logits = model(input_ids=input_ids, **{CACHE: cache}).logits
        for _ in range(6):
            wrong = torch.randint(3, 96, (1, int(torch.randint(2, 12, (), generator=generator))), generator=generator)
            model(input_ids=wrong, **{CACHE: cache})
            cache.crop(-wrong.shape[1])
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
            logits = model(input_ids=input_ids[:, -1:], **{CACHE: cache}).logits
        return input_ids

    return write(model, prompt(1), DynamicCache(config=model.config), custom_generate=generate)


@pytest.mark.parametrize("name", ["heavy hitters", "pyramid"])
@pytest.mark.parametrize("max_sparse_q", [1, 12], ids=["dense checks", "sparse checks"])
def test_rejected_drafts_leave_what_no_draft_leaves(llama, name, max_sparse_q):
    with composed(SELECTORS[name]).attach(llama, max_sparse_q=max_sparse_q):
        expected = write(llama, prompt(1), eos_token_id=None, max_new_tokens=6)
        for seed in range(2):
            assert torch.equal(drafts(llama, seed), expected)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("chunk", [25, 43])  # the last chunk has 15 tokens, or 4: fewer than the window
def test_chunks_leave_what_one_prefill_leaves(llama, name, chunk):
    inputs = prompt(2, (0, 30))
    with composed(SELECTORS[name]).attach(llama):
        expected = write(llama, inputs)
        assert torch.equal(write(llama, inputs, prefill_chunk_size=chunk), expected)
        assert torch.equal(write(llama, inputs, prefill_chunk_size=chunk, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", SELECTORS)
def test_assisted_decoding_whose_checks_search_writes_what_plain_decoding_does(llama, name):
    inputs = prompt(1)
    inputs["input_ids"][:, 45:] = inputs["input_ids"][:, :45].clone()  # something to look up
    with composed(SELECTORS[name]).attach(llama, max_sparse_q=200):
        expected = write(llama, inputs, eos_token_id=None)
        assert torch.equal(write(llama, inputs, eos_token_id=None, prompt_lookup_num_tokens=4), expected)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_crop_between_two_questions_leaves_what_the_context_alone_leaves(llama, name):
    context, questions = prompt(1)["input_ids"], [prompt(1, seed=i)["input_ids"][:, :11] for i in (5, 6)]

    def ask(question, cache):
        ids = torch.cat([context, question], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return write(llama, inputs, cache, eos_token_id=None)

    with composed(SELECTORS[name]).attach(llama), torch.no_grad():
        expected = ask(questions[1], DynamicCache(config=llama.config))
        for asked_apart in (False, True):
            cache = DynamicCache(config=llama.config)
            if asked_apart:
                llama(input_ids=context, **{CACHE: cache})
            ask(questions[0], cache)
            cache.crop(LENGTH - cache.get_seq_length())
            assert torch.equal(ask(questions[1], cache), expected)
