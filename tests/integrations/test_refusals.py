"""Calls that are refused are refused before any layer has run: every layer of the cache is as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hashattn import ExactAttend, HashAttention, HeavyHitters, SimHash
from hashattn.integrations.attached.mask import read_mask, read_padding
from tests.integrations.models import CACHE, LENGTH, ON_CPU, TENTH, make, prompt, write
from tests.integrations.tiny import build

CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=LENGTH + 30),
}
HOLES = "hides keys in the middle of a row"


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    return make(request.param, num_hidden_layers=2)  # a sliding window comes first in Gemma 3


def run(model, ids, mask, cache=None, **options):
    given = {"use_cache": False} if cache is None else {CACHE: cache}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **given, **options).logits


def contents(cache):
    """What the layers hold, and how many columns each has seen."""
    found = []
    for layer in cache.layers:
        seen = int(layer.get_seq_length())
        held = [] if not seen else [x[:, :, :seen].clone() for x in (layer.keys, layer.values)]
        found.append((seen, getattr(layer, "cumulative_length", None), held))
    return found


def unchanged(cache, before):
    for (seen, length, held), (old_seen, old_length, old) in zip(contents(cache), before, strict=True):
        assert seen == old_seen and (length is None or int(length) == int(old_length))
        assert all(torch.equal(a, b) for a, b in zip(held, old, strict=True))


def wrong_masks(rows, past, tokens):
    """Masks over past + tokens columns that cannot be served, and what is said of them."""
    keys = past + tokens
    hole = torch.ones(rows, keys, dtype=torch.int64)
    hole[-1, keys // 2] = 0
    right = torch.ones_like(hole)
    right[-1, -1] = 0
    short = torch.ones(rows, keys - 1, dtype=torch.int64)
    causal = torch.ones(tokens, keys, dtype=torch.bool).tril(past).expand(rows, 1, tokens, keys).clone()
    floats = torch.zeros(rows, 1, tokens, keys).masked_fill(~causal, torch.finfo(torch.float32).min)
    causal[:, :, :, keys // 2] = False
    return {
        "hole": (hole, HOLES), "right padding": (right, HOLES), "too short": (short, "not over"),
        "4-D float": (floats, "not boolean"), "4-D hole": (causal, HOLES),
    }  # fmt: skip


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", wrong_masks(1, 8, 2))
def test_a_mask_is_refused_at_the_prefill_in_a_second_turn_and_at_a_step(model, kind, name):
    ids = prompt(2, (0, 0))["input_ids"]
    expected = {}
    with ON_CPU.attach(model):
        for refusing in (False, True):
            cache = CACHES[kind](model)
            for tokens in (40, 5, 1):
                past = int(cache.get_seq_length(1)) if cache.layers else 0
                part, good = ids[:, past : past + tokens], torch.ones(2, past + tokens, dtype=torch.int64)
                if refusing:
                    mask, words = wrong_masks(2, past, tokens)[name]
                    if name.startswith("4-D") and model.config.model_type == "gemma3_text":
                        mask = {"full_attention": mask, "sliding_attention": None}
                    before = contents(cache)
                    with pytest.raises(ValueError, match=words):
                        run(model, part, mask, cache)
                    unchanged(cache, before)
                logits = run(model, part, good, cache)
                assert torch.equal(expected.setdefault(tokens, logits), logits)


@pytest.mark.parametrize("name", wrong_masks(1, 8, 2))
def test_so_it_is_in_simulated_calls(model, name):
    ids = prompt(2, (0, 0))["input_ids"][:, :40]
    mask, words = wrong_masks(2, 0, 40)[name]
    if name.startswith("4-D") and model.config.model_type == "gemma3_text":
        mask = {"full_attention": mask, "sliding_attention": None}
    with ON_CPU.attach(model, simulate=True) as handle:
        with pytest.raises(ValueError, match=words):
            run(model, ids, mask)
        assert all(not row.sparse and not row.dense for row in handle.report().layers)
        cache = DynamicCache(config=model.config)
        before = contents(cache)
        with pytest.raises(ValueError, match=words):
            run(model, ids, mask, cache)
        unchanged(cache, before)
        run(model, ids, torch.ones_like(ids), cache)


def test_without_strict_such_calls_are_dense(model):
    ids = prompt(2, (0, 0))["input_ids"]
    mask = torch.ones(2, 41, dtype=torch.int64)
    mask[1, 20] = 0

    def logits():
        cache = DynamicCache(config=model.config)
        run(model, ids[:, :40], mask[:, :40], cache)
        return run(model, ids[:, 40:41], mask, cache)

    expected = logits()
    with ON_CPU.attach(model, strict=False) as handle:
        assert torch.allclose(logits(), expected, atol=1e-5)
        assert any("hides keys" in reason for reason in handle.report().layers[1].dense)


def test_where_nothing_searches_every_mask_is_served(model):
    ids = prompt(2, (0, 0))["input_ids"][:, :40]
    for mask in (wrong_masks(2, 0, 40)[name][0] for name in ("hole", "right padding")):
        expected = run(model, ids, mask)
        for attn in (TENTH.replace(engine="dense"), HashAttention.from_preset("full")):
            with attn.attach(model):
                cache = DynamicCache(config=model.config)
                assert torch.allclose(run(model, ids, mask, cache), expected, atol=1e-5)
        with TENTH.attach(model):  # and without a cache, where nothing will be searched
            assert torch.allclose(run(model, ids, mask), expected, atol=1e-5)


def test_a_refusal_in_generate_leaves_the_cache_of_the_turn_before(model):
    with ON_CPU.attach(model):
        out = write(
            model, prompt(1), DynamicCache(config=model.config), return_dict_in_generate=True, eos_token_id=None
        )
        cache = out[CACHE]
        before = contents(cache)
        ids = torch.cat([out.sequences, prompt(1, seed=5)["input_ids"][:, :9]], 1)
        mask = torch.ones_like(ids)
        mask[:, 50] = 0
        with pytest.raises(ValueError, match=HOLES):
            write(model, {"input_ids": ids, "attention_mask": mask}, cache)
        unchanged(cache, before)
        write(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache)


@pytest.mark.parametrize("kind", CACHES)
def test_rows_and_room_are_refused_before_a_sliding_window_has_grown(model, kind):
    with ON_CPU.attach(model):
        cache = CACHES[kind](model)
        ids = prompt(2, (0, 0))["input_ids"]
        run(model, ids[:, :40], None, cache)
        before = contents(cache)
        with pytest.raises(ValueError, match="holds 2 rows, but the input has 1"):
            run(model, ids[:1, :3], None, cache)
        unchanged(cache, before)
        if kind == "static":
            with pytest.raises(ValueError, match="max_cache_len=120 tokens, but the input has 90"):
                run(model, ids, None, cache)
            unchanged(cache, before)


def test_padding_that_fills_a_whole_chunk_is_served():
    """The first chunk of a short row holds none of its tokens; a selector that looks back sees it all the same."""
    model, inputs = make(num_hidden_layers=2), prompt(2, (0, 50))
    for attn in (ON_CPU, HashAttention(selector=HeavyHitters(k=20), attend=ExactAttend(), engine="reference")):
        with attn.attach(model):
            expected = write(model, inputs, max_new_tokens=4)
            assert torch.equal(write(model, inputs, max_new_tokens=4, prefill_chunk_size=20), expected)


def test_what_masks_say():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert read_padding(mask, 3, 4) == ([2, 0, 4], None)
    assert read_padding(mask, 3, 3)[0] == [2, 0, 3]  # columns beyond the keys are not looked at
    assert HOLES in read_padding(torch.tensor([[1, 0, 1]]), 1, 3)[1]
    heads = torch.ones(1, 2, 1, 3, dtype=torch.bool)
    assert read_mask(heads, 1, 3, 1) == ([0], None)
    heads[:, 1, :, 1] = False  # a mask of its own for the second head
    assert HOLES in read_mask(heads, 1, 3, 1)[1]
    assert "not boolean" in read_mask(torch.ones(2, 1, 1, 3, dtype=torch.bool), 3, 3, 1)[1]


def refused(model, ids, cache):
    """The error of a call in which the last layer is as if it went round the attention function."""

    def around(module, args, kwargs, output):
        kwargs["hashattn_call"].reached = False

    last = model.model.layers[-1].self_attn
    with (
        last.register_forward_hook(around, prepend=True, with_kwargs=True),
        pytest.raises(ValueError, match="did not call the attention function") as error,
    ):
        run(model, ids, None, cache)
    return error.value


@pytest.mark.parametrize("kind", CACHES)
def test_what_only_the_last_layer_can_see_is_refused_and_every_layer_is_as_it_was(model, kind):
    """Also where a sliding window had let go of tokens, and where the first call is refused."""
    ids, found = prompt(2, (0, 0))["input_ids"], []
    with ON_CPU.attach(model):
        for refusing in (False, True):
            cache, logits = CACHES[kind](model), []
            for first, end in ((0, 40), (40, 45), (45, 46)):
                if refusing:
                    before = contents(cache)
                    assert not hasattr(refused(model, ids[:, first:end], cache), "__notes__")
                    unchanged(cache, before)
                logits.append(run(model, ids[:, first:end], None, cache))
            found.append(logits)
    assert all(map(torch.equal, *found))


def test_recurrent_states_that_cannot_go_back_are_named():
    model, ids = build("granitemoehybrid"), prompt(1)["input_ids"]
    with ON_CPU.replace(encoder=SimHash(64, centring=None)).attach(model):
        cache = DynamicCache(config=model.config)
        assert not hasattr(refused(model, ids[:, :9], cache), "__notes__")
        logits = run(model, ids[:, :9], None, cache)
        assert torch.equal(logits, run(model, ids[:, :9], None, DynamicCache(config=model.config)))
        assert refused(model, ids[:, 9:12], cache).__notes__ == [
            "layers [0] of its cache cannot take back what they were given: start with a new one"
        ]
        assert len(cache.layers[1].kv) == 9


def test_votes_go_back_too(model):
    ids = prompt(2, (0, 0))["input_ids"]
    with HashAttention(selector=HeavyHitters(k=20), engine="reference").attach(model):
        cache, alone = (DynamicCache(config=model.config) for _ in range(2))
        for first, end in ((0, 40), (40, 41), (41, 42)):
            refused(model, ids[:, first:end], cache)
            assert torch.equal(*(run(model, ids[:, first:end], None, c) for c in (cache, alone)))
