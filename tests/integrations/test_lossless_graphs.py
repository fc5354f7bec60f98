"""Checked drafts whose steps and checks are replayed: the tokens and caches of eager ones, and of the model alone."""

import pytest
import torch
from transformers import DynamicCache

from hashattn.integrations.attached.draft_length import DraftLength
from hashattn.integrations.transformers import HashedLayer
from hashattn.integrations.transformers.lossless.calls import Calls
from hashattn.integrations.transformers.lossless.draft import Draft
from hashattn.integrations.transformers.static_layer import HashedStaticLayer
from tests.integrations.lossless import cache, cheap_drafts, same_cache, text
from tests.integrations.models import CACHE, LENGTH, TENTH, check_codes, make
from tests.integrations.recorder import graphs_anywhere

__all__ = ["cheap_drafts", "graphs_anywhere"]
pytestmark = pytest.mark.usefixtures("cheap_drafts", "graphs_anywhere")
FUSED = TENTH.replace(engine="gpu", dense_layers=(0,))
OPTIONS = {"eos_token_id": None, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def model():
    return make(head_dim=64, num_hidden_layers=3, initializer_range=0.04)


def ways(model, run, attn=FUSED, draft=3):
    """What run() gives unattached, with eager steps and with replayed ones, and the reports of these."""
    torch.manual_seed(7)
    found, reports = [run()], []
    for graph in ("never", "auto"):
        with attn.attach(model, check="dense", draft=draft, graph=graph) as handle:
            torch.manual_seed(7)
            found.append(run())
            reports.append(handle.report())
    return found, reports


CASES = {
    "one row": (1, {}),
    "padded rows": (3, {}),
    "sampling": (3, {"do_sample": True, "temperature": 0.8}),
    "an end": (2, {"eos_token_id": [11, 41, 17, 60, 5]}),
    "static": (2, {"cache_implementation": "static"}),
    "processors": (2, {"repetition_penalty": 1.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_replays_write_what_the_model_writes(model, case):
    rows, options = CASES[case]
    (expected, eager, replayed), (plain, own) = ways(model, lambda: text(model, rows, **{**OPTIONS, **options}))
    assert torch.equal(eager.sequences, expected.sequences) and torch.equal(replayed.sequences, expected.sequences)
    held = cache(replayed)
    assert held.get_seq_length() == expected.sequences.shape[1] - 1
    same_cache(held, cache(expected))
    check_codes(held)
    assert own.drafts.acceptance == plain.drafts.acceptance and own.drafts.passes == plain.drafts.passes
    calls = own.drafts.passes + own.drafts.plain
    assert own.graph.replayed > calls and own.graph.captured <= 6, own.graph
    assert own.layers[-1].engine == "gpu" and own.layers[-1].sparse == plain.layers[-1].sparse
    assert own.layers[-1].dense == plain.layers[-1].dense
    assert own.layers[-1].keys_read == pytest.approx(plain.layers[-1].keys_read, rel=0.02)


def test_no_layer_is_cropped_by_the_host(model, monkeypatch):
    crops, crop = [], HashedLayer.crop
    monkeypatch.setattr(HashedLayer, "crop", lambda self, n: crops.append(n) or crop(self, n))
    with FUSED.attach(model, check="dense", draft=3) as handle:
        text(model, 2, **OPTIONS)
        assert handle.report().drafts.passes > 6
        assert len([n for n in crops if n]) <= 4 * 3  # until both graphs are there


@pytest.mark.parametrize("layer", [0, 2])
def test_who_looks_between_passes_sees_what_was_written(model, monkeypatch, layer):
    seen, step = [], DraftLength.next

    def look(self, most):
        if held:
            layers = held[0].layers
            seen.append((layers[layer].keys.shape[2], layers[layer].filled))
        return step(self, most)

    held = []
    monkeypatch.setattr(DraftLength, "next", look)
    expected = text(model, 1, **OPTIONS)
    with FUSED.attach(model, check="dense", draft=3):
        prefill = Calls.prefill
        monkeypatch.setattr(Calls, "prefill", lambda self, *given: (prefill(self, *given), held.append(self.cache))[0])
        found = text(model, 1, **OPTIONS)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(columns == filled >= LENGTH for columns, filled in seen) and len(seen) > 7
    same_cache(cache(found), cache(expected))


@pytest.mark.parametrize("after", [3, 8, 13])
def test_errors_between_replays(model, after):
    class Stopping:
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > LENGTH + after:
                raise KeyError("no more")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run():
        held = DynamicCache(config=model.config)
        with pytest.raises(KeyError):
            text(model, 2, **{CACHE: held}, **OPTIONS, stopping_criteria=[Stopping()])
        return held

    (expected, eager, replayed), _ = ways(model, run)
    for held in (eager, replayed):
        same_cache(held, expected)
        check_codes(held)


def test_drafts_that_are_always_wrong(model, monkeypatch):
    guess = Draft._guess
    monkeypatch.setattr(Draft, "_guess", lambda *given: (guess(*given) + 1) % 97)
    (expected, _, replayed), (_, own) = ways(model, lambda: text(model, 2, **OPTIONS))
    assert torch.equal(replayed.sequences, expected.sequences) and own.drafts.fidelity < 0.1
    same_cache(cache(replayed), cache(expected))


def test_where_nothing_searches_and_where_it_turns(model):
    for attn in (FUSED.replace(engine="dense"), FUSED):
        (expected, _, replayed), (_, own) = ways(model, lambda: text(model, 2, **OPTIONS), attn)
        assert torch.equal(replayed.sequences, expected.sequences) and own.graph.replayed


def test_memory_that_is_outgrown(model):
    (expected, _, replayed), (_, own) = ways(model, lambda: text(model, 2, **{**OPTIONS, "max_new_tokens": 150}))
    assert torch.equal(replayed.sequences, expected.sequences) and own.graph.captured > 2
    same_cache(cache(replayed), cache(expected))


def test_static_layers_say_how_much_was_written(model):
    with FUSED.attach(model, check="dense", draft=3):
        out = text(model, 2, cache_implementation="static", **OPTIONS)
        assert all(type(layer) is HashedStaticLayer for layer in cache(out).layers)
        assert {int(layer.get_seq_length()) for layer in cache(out).layers} == {LENGTH + 29}
