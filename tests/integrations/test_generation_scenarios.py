"""What transformers' own tests ask of generate(), asked of attached models: with a budget of everything and an engine
that searches, they write what the model writes by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.integrations.models import CACHE, EVERYTHING, MODELS, cache_of, forward, make, prompt

TOKENS = 4


MADE = {}


def made(name):
    if name not in MADE:
        MADE[name] = make(name, num_hidden_layers=2)
    return MADE[name]


@pytest.fixture(params=MODELS)
def model(request):
    return made(request.param)


@pytest.fixture(params=["llama", "gemma3"])
def either(request):
    """A model all of whose layers search, and one with sliding windows."""
    return made(request.param)


def generate(model, inputs=None, **options):
    """Sequences, and logits of each step; whatever is drawn is drawn from one seed."""
    torch.manual_seed(11)
    given = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(
        **(prompt() if inputs is None else inputs), **given, return_dict_in_generate=True, output_logits=True
    )


def same(model, run, *, close=True, **options):
    """run(model) gives the same while attached, and searches."""
    with torch.no_grad():
        expected = run(model)
        with EVERYTHING.attach(model, **options) as handle:
            found = run(model)
            rows = handle.report().layers
    assert any(row.sparse for row in rows)
    assert torch.equal(found.sequences, expected.sequences)
    if close and found.logits is not None:
        for a, b in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(a, b, atol=1e-3)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20, "temperature": 1.5, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"prefill_chunk_size": 23},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "sampling", "beams", "chunks", "static"],
)
def test_ways_to_write(model, options):
    same(model, lambda m: generate(m, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True, "num_beams": 2, "prefill_chunk_size": 40},
    ],
    ids=["beam sampling", "processors", "static beams and chunks"],
)
def test_more_ways_to_write(either, options):
    same(either, lambda m: generate(m, **options))


def test_left_padding_changes_nothing(model):
    """Rows of a padded batch write what each writes alone."""
    inputs = prompt(2, (0, 9))
    with EVERYTHING.attach(model):
        together = generate(model, inputs)
        for row, n in enumerate((0, 9)):
            alone = generate(model, {key: x[row : row + 1, n:] for key, x in inputs.items()})
            assert torch.equal(together.sequences[row, n:], alone.sequences[0])
            for a, b in zip(together.logits, alone.logits, strict=True):
                assert torch.allclose(a[row], b[0], atol=1e-3)


def test_positions_and_masks_may_be_left_to_generate(either):
    ids = prompt(1)["input_ids"]
    same(either, lambda m: generate(m, {"input_ids": ids}))
    with EVERYTHING.attach(either):
        with_mask, without = generate(either, prompt(1)), generate(either, {"input_ids": ids})
    assert torch.equal(with_mask.sequences, without.sequences)


def test_it_goes_on_from_a_cache(model):
    """A few tokens and then some more are as many at once."""
    inputs = prompt(2, (0, 0))

    def run(m):
        whole = generate(m, inputs)
        part = generate(m, inputs, max_new_tokens=2)
        mask = torch.ones_like(part.sequences)
        rest = generate(
            m, {"input_ids": part.sequences, "attention_mask": mask}, max_new_tokens=TOKENS - 2,
            **{CACHE: cache_of(part)},
        )  # fmt: skip
        assert torch.equal(rest.sequences, whole.sequences)
        return rest

    same(model, run)


def test_embeddings_are_as_good_as_tokens(model):
    inputs = prompt()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def run(m):
        by_embeds = generate(m, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
        by_tokens = generate(m, inputs)
        assert torch.equal(by_embeds.sequences, by_tokens.sequences[:, inputs["input_ids"].shape[1] :])
        return by_embeds

    same(model, run)


@pytest.mark.parametrize(("draft", "max_sparse_q"), [("assistant", 8), ("lookup", 1), ("lookup", 8), ("early exit", 8)])
def test_drafts_change_nothing(model, draft, max_sparse_q):
    inputs = prompt(1)
    inputs["input_ids"][:, 45:] = inputs["input_ids"][:, :45].clone()  # something to look up
    options = {
        "assistant": {"assistant_model": make("qwen3", num_hidden_layers=1)},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "early exit": {"assistant_early_exit": 1},
    }[draft]
    if draft == "early exit":
        try:
            generate(copy.deepcopy(model), inputs, **options)
        except TypeError as error:  # a window that the draft did not fill is cropped, with transformers 5.17
            pytest.skip(f"transformers does not leave this model early by itself: {error}")
    with torch.no_grad():
        expected = generate(model, inputs)
        with EVERYTHING.attach(model, max_sparse_q=max_sparse_q):
            found = generate(model, inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_is_cropped_and_asked_again(model, kind):
    context = prompt(1)["input_ids"][:, :60]
    questions = [prompt(1, seed=i)["input_ids"][:, :7] for i in (5, 6)]
    room = 100
    sliding = model.config.model_type == "gemma3_text"

    def cache():
        if kind == "static":
            return StaticCache(config=model.config, max_cache_len=room)
        return DynamicCache(config=model.config)

    def ask(m, question, held):
        ids = torch.cat([context, question], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(m, inputs, **{CACHE: held}, disable_compile=True)

    def run(m):
        fresh = ask(m, questions[1], cache())
        if sliding:  # a window that has moved on cannot be cropped: the second turn goes on
            held = cache()
            first = ask(m, questions[0], held)
            ids = torch.cat([first.sequences, questions[1]], 1)
            return generate(m, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **{CACHE: held})
        held = cache()
        forward(m, context, held)
        ask(m, questions[0], held)
        if not all(hasattr(layer, "crop") for layer in held.layers):  # static ones of transformers 5.17 by itself
            return fresh
        held.crop(60 - int(held.get_seq_length()))
        again = ask(m, questions[1], held)
        assert torch.equal(again.sequences, fresh.sequences)
        return again

    same(model, run)


def test_static_and_dynamic_caches_write_the_same(either):
    with EVERYTHING.attach(either):
        dynamic = generate(either)
        static = generate(either, **{CACHE: StaticCache(config=either.config, max_cache_len=120)}, disable_compile=True)
    assert torch.equal(dynamic.sequences, static.sequences)
    for a, b in zip(dynamic.logits, static.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_without_a_cache_it_is_the_model_itself(either):
    expected = generate(either, use_cache=False, max_new_tokens=3)
    with EVERYTHING.attach(either) as handle:
        found = generate(either, use_cache=False, max_new_tokens=3)
        assert all(not row.sparse for row in handle.report().layers)
    assert torch.equal(found.sequences, expected.sequences)


def test_hidden_states_are_returned_as_ever(either):
    found = same(either, lambda m: generate(m, output_hidden_states=True))
    assert len(found.hidden_states) == TOKENS
    assert len(found.hidden_states[0]) == 3  # of the embeddings and two layers


def test_a_batch_of_one_token_prompts(either):
    ids = torch.tensor([[5], [7]])
    same(either, lambda m: generate(m, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, max_new_tokens=24))
