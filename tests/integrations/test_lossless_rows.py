"""Checked drafts of a batch: each row accepts what full attention would have written of its own draft."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LogitsProcessor, TextStreamer

from hashattn import FlatHamming, HashAttention, MultiProbe, SimHash
from hashattn.integrations.transformers.lossless.calls import Calls
from hashattn.integrations.transformers.lossless.columns import FIRST, LAST, close_holes
from hashattn.integrations.transformers.lossless.draft import Draft
from tests.integrations.lossless import both, cache, cheap_drafts, preset, same_cache, text
from tests.integrations.models import CACHE, LENGTH, TENTH, check_codes, make, prompt
from tests.integrations.recorder import graphs_anywhere

__all__ = ["cheap_drafts", "graphs_anywhere"]
pytestmark = pytest.mark.usefixtures("cheap_drafts")
PADDING = (0, 9, 4, 31, 0)
FUSED = TENTH.replace(engine="gpu", dense_layers=(0,))


@pytest.fixture(scope="module")
def llama():
    return make(initializer_range=0.04)


@pytest.fixture(scope="module")
def gemma():
    return make("gemma3", initializer_range=0.04)


@pytest.fixture
def kept(monkeypatch):
    """What each check kept of each row, where rows went on apart."""
    found, keep = [], Calls.keep

    def look(self, rows, appended):
        if self.rows is not None:
            found.append([*rows])
        keep(self, rows, appended)

    monkeypatch.setattr(Calls, "keep", look)
    return found


def many(model, rows, **options):
    return text(model, rows, PADDING, **{"eos_token_id": None, "max_new_tokens": 40, **options})


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [3, 5])
def test_rows_accept_different_numbers_of_tokens(request, kept, kind, rows, options):
    model = request.getfixturevalue(kind)
    run = lambda: (many(model, rows, **options), torch.random.get_rng_state())  # noqa: E731
    (expected, before), (written, after), report = both(model, TENTH, run)
    assert torch.equal(written.sequences, expected.sequences) and torch.equal(before, after)
    same_cache(cache(written), cache(expected))
    check_codes(cache(written))
    assert any(len(set(row)) > 1 for row in kept)
    assert report.drafts.tokens == rows * 39
    assert len(kept) < sum(map(sum, zip(*kept, strict=True))) / rows  # more than a token a pass


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_end_at_different_times(request, kept, kind, do_sample):
    model = request.getfixturevalue(kind)
    alone = many(model, 5).sequences[:, LENGTH:]
    for places in ((5, 12, 20), (1, 3, 33)):
        ends = [int(alone[row, place]) for row, place in enumerate(places)]
        run = lambda ends=ends: many(model, 5, eos_token_id=ends, do_sample=do_sample)  # noqa: E731
        expected, found, _ = both(model, TENTH, run)
        assert torch.equal(found.sequences, expected.sequences)
        same_cache(cache(found), cache(expected))
        lengths = (expected.sequences[:, LENGTH:] != 0).sum(1).tolist()
        assert kept and len(set(lengths)) > 2, lengths


def test_long_rows_keep_their_first_and_last_columns(llama, kept):
    ids = torch.randint(3, 96, (3, 400), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :30] = ids[1, :30] = 0
    options = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    run = lambda: llama.generate(  # noqa: E731
        ids, attention_mask=mask, return_dict_in_generate=True, **options
    )
    expected, written, _ = both(llama, preset("dashkv_fast"), run)
    assert torch.equal(written.sequences, expected.sequences) and len({n for row in kept for n in row}) > 1
    same_cache(cache(written), cache(expected))
    check_codes(cache(written))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_second_turn(request, kept, kind):
    model = request.getfixturevalue(kind)
    more, mask = prompt(5, seed=8)["input_ids"][:, :7], prompt(5, PADDING)["attention_mask"]

    def run():
        first = many(model, 5, max_new_tokens=15, eos_token_id=[11, 41, 17])
        longer = torch.cat([first.sequences, more], 1)
        seen = torch.cat([mask, mask.new_ones(5, longer.shape[1] - LENGTH)], 1)
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return longer, model.generate(longer, attention_mask=seen, **{CACHE: cache(first)}, **options), cache(first)

    (a, b, expected), (c, d, found), _ = both(model, TENTH, run)
    assert torch.equal(a, c) and torch.equal(b, d) and kept
    same_cache(found, expected)


CASES = {
    "three rows": (3, {}),
    "sampling": (5, {"do_sample": True, "temperature": 0.8}),
    "ends": (5, {"eos_token_id": [11, 41, 17, 60, 5]}),
    "penalties": (3, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    "outgrown": (3, {"max_new_tokens": 150}),
}


@pytest.mark.parametrize("case", CASES)
def test_replays(llama, graphs_anywhere, kept, case):
    model = make(head_dim=64, num_hidden_layers=3, initializer_range=0.04)
    rows, options = CASES[case]
    expected, found, report = both(model, FUSED, lambda: many(model, rows, **options), draft=3)
    assert torch.equal(found.sequences, expected.sequences)
    same_cache(cache(found), cache(expected))
    check_codes(cache(found))
    assert any(len(set(row)) > 1 for row in kept)
    assert report.graph.replayed > report.drafts.passes, report.graph


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_selectors_that_look_back_go_on_together(llama, kept, name):
    expected, written, _ = both(llama, preset(name), lambda: many(llama, 3))
    assert torch.equal(written.sequences, expected.sequences) and not kept


def test_indexes_that_know_columns_go_on_together(llama, kept):
    attn = HashAttention(SimHash(128), MultiProbe(tables=8, bits=8), TENTH.selector, engine="reference")
    expected, written, _ = both(llama, attn, lambda: many(llama, 3))
    assert torch.equal(written.sequences, expected.sequences) and not kept


class Counting(LogitsProcessor):
    """Looks at the whole batch."""

    def __call__(self, input_ids, scores):
        return scores - 0.1 * (input_ids[:, -1] == input_ids[:, -1].roll(1))[:, None]


TOGETHER = {
    "own processor": {"logits_processor": [Counting()]},
    "scores": {"output_scores": True},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("what", TOGETHER)
def test_what_asks_for_all_rows_keeps_them_together(llama, kept, what):
    expected, written, _ = both(llama, TENTH, lambda: many(llama, 3, **TOGETHER[what]))
    assert torch.equal(written.sequences, expected.sequences) and not kept
    same_cache(cache(written), cache(expected))


def test_streamers_of_one_text_refuse_batches(llama):
    run = lambda: many(llama, 3, streamer=TextStreamer(None))  # noqa: E731
    with pytest.raises(ValueError, match="only supports batch size 1"):
        run()
    with TENTH.attach(llama, check="dense"), pytest.raises(ValueError, match="only supports batch size 1"):
        run()


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("calls", [4, 11, 14, 23])
def test_an_error_leaves_what_all_rows_have(request, kept, kind, calls):
    model, seen = request.getfixturevalue(kind), []

    def fail(module, args):
        seen.append(1)
        if len(seen) > calls:
            raise KeyError("no more")

    held = DynamicCache(config=model.config)
    with TENTH.attach(model, check="dense", draft=5):
        hook = model.model.layers[2].register_forward_pre_hook(fail)
        try:
            with pytest.raises(KeyError):
                many(model, 5, **{CACHE: held})
        finally:
            hook.remove()
        written = held.get_seq_length() - LENGTH
        assert written >= 0
        check_codes(held)
    same_cache(held, cache(many(model, 5, max_new_tokens=written + 1)))
    assert not any(getattr(layer, "record_past", False) for layer in held.layers)


def test_drafts_that_are_wrong_in_one_row_alone(llama, kept, monkeypatch):
    guess = Draft._guess

    def wrong(*given):
        tokens = guess(*given)
        tokens[1] = (tokens[1] + 1) % 97
        return tokens

    monkeypatch.setattr(Draft, "_guess", wrong)
    attn = TENTH.replace(selector=TENTH.selector.with_budget(share=1.0))
    expected, written, _ = both(llama, attn, lambda: many(llama, 3), draft=4)
    assert torch.equal(written.sequences, expected.sequences)
    assert {tuple(row) for row in kept[:7]} == {(5, 1, 5), (1, 1, 1)}  # the others do not wait; steps without a draft
    same_cache(cache(written), cache(expected))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 400), st.integers(0, 16)), min_size=1, max_size=4))
def test_holes_are_closed_with_what_a_row_holds(rows):
    end = max(s + n + h for s, n, h in rows)
    starts, ends, holes = zip(*((end - n - h, end - h, h) for _, n, h in rows), strict=True)
    shift = -min(starts) if min(starts) < 0 else 0
    starts, ends, end = [s + shift for s in starts], [e + shift for e in ends], end + shift
    held = torch.full((len(rows), end), -1)
    for row, (s, e) in enumerate(zip(starts, ends, strict=True)):
        held[row, s:e] = torch.arange(e - s)
    sources, targets = close_holes([*starts], [*ends], [*holes])
    held.scatter_(1, targets, held.gather(1, sources))
    for row, (s, e, h) in enumerate(zip(starts, ends, holes, strict=True)):
        found, n = held[row, s + h :], e - s
        assert sorted(found.tolist()) == [*range(n)]  # nothing is lost, or there twice
        first, last = min(FIRST, n), min(LAST, n)
        assert found[:first].tolist() == [*range(first)] and found[n - last :].tolist() == [*range(n - last, n)]


def test_caches_move_columns():
    attn = TENTH
    kv = attn.new_cache(2, 2, 16)
    k, v = torch.randn(2, 2, 2, 60, 16)
    kv.append(k, v)
    kv.encode()
    centre = kv.centre.clone()
    sources, targets = close_holes([0, 0], [60, 55], [0, 5])
    kv.move(sources, targets, [0, 5])
    assert torch.equal(kv.keys[0], k[0]) and torch.equal(kv.keys[1, :, 5:], k[1, :, :55])
    assert torch.equal(kv.values[1, :, 5:], v[1, :, :55]) and kv._starts == [0, 5]
    assert torch.equal(kv.codes, kv.encoder.encode_key(kv.keys, centre)) and torch.equal(kv.centre, centre)
    looking = HashAttention(SimHash(128), MultiProbe(tables=8, bits=8), TENTH.selector).new_cache(2, 2, 16)
    looking.append(k, v)
    with pytest.raises(ValueError, match="its index knows keys by their columns"):
        looking.move(sources, targets, [0, 5])
    assert FlatHamming().new_store().movable
