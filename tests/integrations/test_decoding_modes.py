"""Ways to decode: whatever generate() does to the cache, the engines write the same and codes follow the keys."""

import pytest
import torch
from transformers import DynamicCache

from tests.integrations.models import (
    CACHE,
    EVERYTHING,
    MODELS,
    NEW,
    ON_CPU,
    TENTH,
    both_engines,
    cache_of,
    check_codes,
    forward,
    make,
    prompt,
    write,
)


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


@pytest.fixture
def llama():
    return make()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 32},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
        {"cache_implementation": "static", "prefill_chunk_size": 32},
    ],
    ids=["greedy", "beams", "returned_beams", "chunks", "static", "static_beams", "static_chunks"],
)
def test_both_engines_write_the_same(model, options):
    def run(model):
        out = write(model, prompt(), return_dict_in_generate=True, **options)
        check_codes(cache_of(out))
        return out.sequences

    sparse = both_engines(model, run)
    assert not torch.equal(sparse, write(model, prompt(), **options))  # so it is not the dense model that wrote


def test_chunks_and_a_static_cache_write_what_one_prefill_and_a_dynamic_cache_do(model):
    with TENTH.attach(model):
        expected = write(model, prompt())
        for options in ({"prefill_chunk_size": 25}, {"cache_implementation": "static"}):
            assert torch.equal(write(model, prompt(), **options), expected)


@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_assisted_decoding_writes_what_plain_decoding_does_if_its_checks_are_sparse(model, draft):
    # The first draft is checked in the same call as the prompt, so the prompt has to be sparse as well.
    inputs = prompt(1)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 45:] = inputs["input_ids"][:, :45]  # something to look up
    options = {"prompt_lookup_num_tokens": 5} if draft == "lookup" else {"assistant_model": make("qwen3")}
    options["eos_token_id"] = None

    def run(model):
        out = write(model, inputs, return_dict_in_generate=True, **options)
        check_codes(cache_of(out))
        return out.sequences

    assisted = both_engines(model, run, max_sparse_q=200)
    with ON_CPU.attach(model, max_sparse_q=200):
        assert torch.equal(write(model, inputs, eos_token_id=None), assisted)
    with ON_CPU.attach(model) as handle:  # by default, checks of several tokens are dense
        run(model)
        assert any(row.dense.get("prefill", 0) > 1 for row in handle.report().layers)


def test_an_attached_assistant_drafts_for_an_attached_model(llama):
    inputs = prompt(1)
    with ON_CPU.attach(llama, max_sparse_q=200):
        expected = write(llama, inputs)
        assistant = make("llama", num_hidden_layers=2)
        with ON_CPU.attach(assistant, max_sparse_q=4) as handle:
            assert torch.equal(write(llama, inputs, assistant_model=assistant), expected)
            assert all(row.sparse for row in handle.report().layers)


def contrastive(model, input_ids, one_by_one, alpha=0.6, top_k=3, **kwargs):
    """Contrastive search (arXiv 2202.06417), batched or with one candidate after the other, as low_memory does."""
    cache, mask = kwargs[CACHE], kwargs["attention_mask"]
    if one_by_one:
        cache.activate_past_recording()

    def step(ids, mask):
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **{CACHE: cache})

    out = step(input_ids, mask)
    if one_by_one:
        cache.crop(0)  # lets sliding windows forget what they recorded
    context, logits = out.hidden_states[-1], out.logits[:, -1]
    for _ in range(NEW):
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
        p, ids = logits.softmax(-1).topk(top_k)
        if one_by_one:
            found = []
            for i in range(top_k):
                out = step(ids[:, i : i + 1], mask)
                found.append((out.hidden_states[-1], out.logits[:, -1]))
                cache.crop(-1)
            hidden, logits = (torch.stack(x, dim=1).flatten(0, 1) for x in zip(*found, strict=True))
        else:
            cache.batch_repeat_interleave(top_k)
            out = step(ids.view(-1, 1), mask.repeat_interleave(top_k, dim=0))
            hidden, logits = out.hidden_states[-1], out.logits[:, -1]
        alike = torch.cosine_similarity(context.repeat_interleave(top_k, dim=0), hidden, dim=-1)
        alike = alike.masked_fill(mask[:, :-1].repeat_interleave(top_k, dim=0) == 0, -1).amax(-1).view_as(p)
        best = ((1 - alpha) * p - alpha * alike).argmax(-1)
        rows = torch.arange(len(p)) * top_k + best
        token = ids.flatten()[rows].unsqueeze(1)
        if one_by_one:
            step(token, mask)
            cache.crop(0)
        else:
            cache.batch_select_indices(rows)
        input_ids = torch.cat([input_ids, token], dim=1)
        context, logits = torch.cat([context, hidden[rows]], dim=1), logits[rows]
    check_codes(cache)
    return input_ids


def test_contrastive_search_repeats_and_picks_rows(model):
    batched, one_by_one = (
        both_engines(model, lambda m, n=n: write(m, prompt(), custom_generate=contrastive, one_by_one=n))
        for n in (False, True)
    )
    assert torch.equal(batched, one_by_one)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_second_turn_on_the_same_cache(model, implementation):
    first = prompt(1)
    more = prompt(1, seed=8)["input_ids"][:, :20]
    options = {"return_dict_in_generate": True, "eos_token_id": None}
    if implementation == "static":
        options["max_cache_len"] = 256

    def run(model):
        given = {} if implementation == "dynamic" else {"cache_implementation": "static"}
        out = write(model, first, **options, **given)
        ids = torch.cat([out.sequences, more], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = write(model, again, cache_of(out), return_dict_in_generate=True, eos_token_id=None)
        if model.config._attn_implementation == "hashattn":
            check_codes(cache_of(out))
        return out.sequences

    expected = run(model)
    with EVERYTHING.attach(model):
        assert torch.equal(run(model), expected)
    both_engines(model, run)


def test_queries_of_one_call_choose_as_they_do_one_at_a_time(model):
    ids = prompt(1)["input_ids"]
    with ON_CPU.attach(model, max_sparse_q=4) as handle:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            forward(model, ids[:, :-4], cache)
        together = forward(model, ids[:, -4:], caches[0])
        single = torch.cat([forward(model, ids[:, i : i + 1], caches[1]) for i in range(86, 90)], dim=1)
        assert max(row.sparse for row in handle.report().layers) == 5
    assert (together - single).abs().max() < 1e-5
