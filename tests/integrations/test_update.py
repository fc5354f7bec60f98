"""Compositions for single layers, changes while attached, and what the report says of them."""

import json

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

from hashattn import (
    Consensus,
    ExactAttend,
    FlatHamming,
    HashAttention,
    HeavyHitters,
    LocalTopK,
    MixedPrecision,
    Momentum,
    ObservationWindow,
    Recent,
    Refine,
    Reuse,
    SimHash,
    Sink,
    SymmetricHash,
    Threshold,
    Tiers,
    TopK,
    TopP,
)
from tests.integrations.models import (
    EVERYTHING,
    LENGTH,
    ON_CPU,
    SHORT,
    TENTH,
    both_engines,
    check_codes,
    forward,
    make,
    prompt,
    write,
)


@pytest.fixture
def llama():
    return make()


@pytest.fixture
def filled(llama):
    """A cache of an attached model, and its handle."""
    cache = DynamicCache(config=llama.config)
    with ON_CPU.attach(llama) as handle:
        forward(llama, prompt(1)["input_ids"], cache)
        forward(llama, torch.tensor([[5]]), cache)
        yield llama, cache, handle


def last(handle):
    """Keys read by each layer in the last call."""
    return [row.keys_read for row in handle.report().layers]


def test_a_larger_budget_serves_the_caches_there_are(filled):
    model, cache, handle = filled
    kept = [(layer.kv, layer.kv.codes.data_ptr()) for layer in cache.layers]
    handle.update(share=1.0, engine="reference")
    found = forward(model, torch.tensor([[6]]), cache)
    assert [(layer.kv, layer.kv.codes.data_ptr()) for layer in cache.layers] == kept
    handle.detach()
    cache.crop(-1)
    assert (found - forward(model, torch.tensor([[6]]), cache)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("selector", "changes", "changed"),
    [
        (TopK(share=0.1), {"share": 0.5}, TopK(share=0.5)),
        (TopK(share=0.1), {"k": 12}, TopK(k=12)),
        (Sink(2) | TopK(k=9), {"share": 0.2, "sinks": 3}, Sink(3) | TopK(share=0.2)),
        (Sink(2) | Recent(4), {"recent": 8}, Sink(2) | Recent(8)),
        (Recent(4) | Tiers(), {"t1": 0.02, "t2": 0.3}, Recent(4) | Tiers(0.02, 0.3)),
        (Threshold(20), {"radius": 30, "limit": 9}, Threshold(30, limit=9)),
        (TopK(k=9), {"per": "kv_head", "combine": "vote"}, TopK(k=9, per="kv_head", combine="vote")),
        (Sink(2) | LocalTopK(32), {"per_chunk": 24, "k": 48}, Sink(2) | LocalTopK(48, 24)),
        (Sink(2) | TopK(share=0.1), {"min_k": 8}, Sink(2) | TopK(share=0.1, min_k=8)),
        (Sink(2) | Tiers(0.05, 0.2), {"share": 0.4}, Sink(2) | Tiers(0.1, 0.4)),
        (HeavyHitters(share=0.2), {"k": 20, "recent": 0.25}, HeavyHitters(k=20, recent=0.25)),
        (ObservationWindow(k=30, window=4), {"share": 0.5}, ObservationWindow(share=0.5, window=4)),
        (Refine(TopK(k=9), 2), {"share": 0.2, "factor": 3}, Refine(TopK(share=0.2), 3)),
        (TopP(TopK(share=0.5)), {"share": 0.25, "p": 0.7}, TopP(TopK(share=0.25), 0.7)),
        (Reuse(TopK(k=9), every=2), {"k": 12, "every": 3}, Reuse(TopK(k=12), every=3)),
        (Sink(2) | Recent(20), {"k": 30}, Sink(2) | Recent(28)),
    ],
    ids=repr,
)
def test_fields_are_changed_wherever_they_sit(llama, selector, changes, changed):
    attn = TENTH.replace(selector=selector)
    with attn.attach(llama) as handle:
        handle.update(**changes)
        assert handle.attn == TENTH.replace(selector=changed)
        found = write(llama, prompt())
    with TENTH.replace(selector=changed).attach(llama):
        assert torch.equal(write(llama, prompt()), found)


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
def test_calibrations_and_learned_parts_keep_their_weights(llama):
    consensus = Consensus(TopK(share=0.1), discount=3.0)
    momentum = Momentum(consensus, discount=5.0)
    encoder, attend = SymmetricHash(64, centring=SHORT.centring), MixedPrecision()
    attn = HashAttention(encoder, FlatHamming(), Sink(2) | momentum, attend, engine="reference")
    with attn.attach(llama) as handle:
        write(llama, prompt())
        handle.update(share=0.3, sinks=5)
        ranked = handle.attn.selector.ranked_part
        assert (ranked.inner.inner, handle.attn.selector.sinks) == (TopK(share=0.3), 5)
        assert ranked.discount is momentum.discount
        assert ranked.inner.discount is consensus.discount
        assert handle.attn.encoder is encoder
        assert handle.attn.attend is attend
        assert (momentum.inner, consensus.inner) == (consensus, TopK(share=0.1))  # the user's own are as they were
        write(llama, prompt())
        read = handle.report().layers[0].keys_read
        handle.reset_report()
        write(llama, prompt())
        assert handle.report().layers[0].keys_read > read


def test_parts_are_exchanged_and_caches_encoded_anew(filled):
    model, cache, handle = filled
    handle.update(encoder=SimHash(128, centring=None), selector=TopK(k=7), attend=ExactAttend())
    handle.reset_report()
    forward(model, torch.tensor([[6]]), cache)
    check_codes(cache)
    assert cache.layers[0].kv.bits == 128
    assert last(handle) == [7 / (LENGTH + 2)] * 4
    handle.update(engine="dense")
    forward(model, torch.tensor([[6]]), cache)
    assert handle.report().layers[0].dense == {"engine is dense": 1}
    check_codes(cache)


def test_some_layers_are_changed(filled):
    model, cache, handle = filled
    handle.update(layers=[1, -1], k=31)
    handle.reset_report()
    forward(model, torch.tensor([[6]]), cache)
    assert [round(x * (LENGTH + 2)) for x in last(handle)] == [10, 31, 10, 31]
    assert handle.attn == ON_CPU
    handle.update(dense_layers=(0, 1))
    handle.reset_report()
    forward(model, torch.tensor([[6]]), cache)
    assert [row.sparse for row in handle.report().layers] == [0, 0, 1, 1]


def test_a_change_in_the_middle_of_generate(llama):
    class Widen(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == LENGTH + 4:
                handle.update(share=1.0)
            return scores

    with TENTH.attach(llama) as handle:
        write(llama, prompt(1), logits_processor=[Widen()], eos_token_id=None)
        row = handle.report().layers[0]
    assert row.sparse == 11
    assert 0.6 < row.keys_read < 0.75  # 4 steps of a tenth, 7 of everything


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"shares": 0.2}, TypeError, "did you mean 'share'"),
        ({"t1": 0.2}, TypeError, "it has sinks, recent, k, share"),
        ({"share": 2.0}, ValueError, "share must be above 0"),
        ({"k": 3, "share": 0.2}, ValueError, "either k or share"),
        ({"selctor": TopK(k=3)}, TypeError, "^'selctor' is no part and no setting of the selector .did you mean 'sel"),
        ({"engine": "fast"}, ValueError, "engine"),
        ({"encoder": SymmetricHash(64).build(8)}, ValueError, "head_dim 8"),
        ({"layers": [0], "share": 0.2, "engine": "fast"}, ValueError, "layer 0: engine"),
        ({"layers": [9], "share": 0.2}, ValueError, "layer 9, but the model has 4"),
        ({"layers": [0, -4], "share": 0.2}, ValueError, "twice"),
        ({"layers": 2, "share": 0.2}, TypeError, "by ints"),
        ({"layers": [1], "dense_layers": (0,)}, ValueError, "dense_layers is for all layers"),
        ({"dense_layers": (7,)}, ValueError, "layer 7"),
    ],
    ids=str,
)
def test_a_refused_change_changes_nothing(filled, changes, error, word):
    model, cache, handle = filled
    cache.crop(-1)
    expected = forward(model, torch.tensor([[6]]), cache)
    with pytest.raises(error, match=word):
        handle.update(**changes)
    assert handle.attn == ON_CPU
    cache.crop(-1)
    assert torch.equal(forward(model, torch.tensor([[6]]), cache), expected)


def test_layers_that_are_not_served_and_a_detached_handle_refuse_changes():
    gemma = make("gemma3")
    with TENTH.attach(gemma) as handle:
        with pytest.raises(ValueError, match="layer 2, which is not served: sliding attention"):
            handle.update(layers=[2], share=0.2)
        handle.update(share=0.2)
    with pytest.raises(RuntimeError, match="detached"):
        handle.update(share=0.2)


def test_single_layers_have_compositions_of_their_own(llama):
    other = HashAttention(SimHash(128, centring=None), FlatHamming(), TopK(k=5), engine="cpu")
    attn = ON_CPU.replace(dense_layers=(0, 1))
    with attn.attach(llama, layers={1: other, -1: TENTH.replace(engine="dense")}) as handle:
        out = write(llama, prompt(1), eos_token_id=None)
        rows = handle.report().layers
    assert [row.sparse for row in rows] == [0, 11, 11, 0]
    assert [row.engine for row in rows] == ["dense", "cpu", "cpu", "dense"]
    assert [row.why for row in rows] == ["dense_layers", 'engine="cpu"', 'engine="cpu"', "engine is dense"]
    assert rows[1].keys_read == pytest.approx(5 / 96, rel=0.01)
    with ON_CPU.attach(
        llama, layers={1: other, 0: ON_CPU.replace(engine="dense"), 3: HashAttention.from_preset("full")}
    ):
        assert torch.equal(write(llama, prompt(1), eos_token_id=None), out)


@pytest.mark.parametrize(
    ("layers", "error", "word"),
    [
        ({4: TENTH}, ValueError, "layer 4, but the model has 4 layers"),
        ({3: TENTH, -1: TENTH}, ValueError, "twice"),
        ({1: "dense"}, TypeError, r"layers\[1\] must be a HashAttention"),
        ({"1": TENTH}, TypeError, "by ints"),
        ([1, 2], TypeError, "must map"),
        ({2: TENTH.replace(encoder=SymmetricHash(64).build(8))}, ValueError, "head_dim 8"),
    ],
    ids=["deep", "twice", "word", "text", "list", "head_dim"],
)
def test_wrong_compositions_for_single_layers_are_refused(llama, layers, error, word):
    with pytest.raises(error, match=word):
        TENTH.attach(llama, layers=layers)
    assert llama.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in llama.modules())


def test_the_report_tells_keys_bytes_engine_and_why(llama):
    with ON_CPU.replace(dense_layers=(0,)).attach(llama) as handle:
        assert [row.keys_read for row in handle.report().layers] == [None] * 4
        write(llama, prompt(1), eos_token_id=None)
        report = handle.report()
    dense, sparse = report.layers[:2]
    keys = sum(range(LENGTH + 1, LENGTH + 12)) / 11  # visible in a step, mean
    assert dense.bytes_per_step == pytest.approx(2 * keys * 2 * 16 * 4)  # keys and values, two heads of 16 floats
    kept = sparse.keys_read * keys * 6
    assert sparse.bytes_per_step == pytest.approx(kept * 2 * 16 * 4 + keys * 2 * 8)  # and 64 bits of each key
    assert report.bytes_per_step == pytest.approx(dense.bytes_per_step + 3 * sparse.bytes_per_step)
    assert report.dense_bytes_per_step == pytest.approx(4 * dense.bytes_per_step)
    assert (sparse.engine, sparse.why, dense.engine, dense.why) == ("cpu", 'engine="cpu"', "dense", "dense_layers")
    table = str(report).splitlines()
    assert table[0].split() == ["layers", "sparse", "calls", "dense", "calls", "keys", "read", "a", "step", "engine"]
    assert [line.split()[0] for line in table[1:3]] == ["0", "1-3"]
    assert table[2].endswith('cpu: engine="cpu"')
    assert json.loads(report.as_json()) == report.as_dict()
    assert report.as_dict()["layers"][1]["engine"] == "cpu"


def test_the_report_says_what_an_engine_cannot_do(llama):
    with HashAttention.from_preset("oracle_topk", share=0.3, dense_layers=(), engine="cpu").attach(llama) as handle:
        write(llama, prompt(1))
        row = handle.report().layers[0]
    assert row.engine == "reference"
    assert "binary codes only" in row.why


def test_both_engines_with_compositions_for_single_layers(llama):
    groups = EVERYTHING.replace(selector=TopK(share=0.2, per="kv_head"), encoder=SHORT)
    single = {1: groups, 2: groups.replace(engine="cpu")}
    both_engines(llama, lambda model: write(model, prompt()), layers=single)
