from dataclasses import replace

import pytest
import torch

from hashattn import (
    CollisionSample,
    FlatHamming,
    HashAttention,
    Momentum,
    Recent,
    Reuse,
    SimHash,
    Sink,
    Step,
    Tiers,
    TopK,
)
from tests.structured import attention64, qkv, raises_naming, selected, tolerance

PLAIN = SimHash(64, centring=None)


def layer(number, selector, tokens=1, batch=2):
    q, k, v = qkv(number, batch, tokens=tokens, keys=65)
    attn = HashAttention(PLAIN, FlatHamming(), selector, engine="reference")
    cache = attn.new_cache(batch, 2, 16)
    cache.append(k, v, start=torch.tensor([0, 30][:batch]))
    return attn, q, cache


def walk(selector, layers=6, tokens=1):
    """The selection of each layer, each told what the one before kept, and the layers that scanned."""
    found, scanned, before = [], [], None
    for number in range(layers):
        attn, q, cache = layer(number, selector, tokens)
        view, scans = cache.view(PLAIN.encode_query(q), 4, cache.spans(tokens)), []

        def scan(whole=view.scan, scans=scans):
            scans.append(True)
            return whole()

        before = attn.selector.select(replace(view, scan=scan), Step(number, before))
        found.append(before)
        scanned.append(bool(scans))
    return found, scanned


@pytest.mark.parametrize("inner", [TopK(k=5), TopK(share=0.2, per="kv_head"), Tiers(0.1, 0.3)], ids=repr)
@pytest.mark.parametrize(
    ("options", "choosing"),
    [({"every": 1}, range(6)), ({"every": 2}, (0, 2, 4)), ({"every": 4}, (0, 4)), ({"layers": (0, 1, 5)}, (0, 1, 5))],
)
def test_layers_in_between_keep_what_was_kept_and_scan_nothing(inner, options, choosing):
    found, scanned = walk(Sink(1) | Recent(2) | Reuse(inner, **options), tokens=2)
    assert scanned == [number in choosing for number in range(6)]
    for number in range(6):
        if number in choosing:
            attn, q, cache = layer(number, Sink(1) | Recent(2) | inner, 2)
            assert torch.equal(found[number].ids, attn.run(q, cache)[1].ids)
        else:
            assert found[number] is found[number - 1]


def test_the_output_is_attention_over_what_the_layer_before_kept():
    attn, q, cache = layer(0, Reuse(TopK(k=9), every=2), 2)
    _, first = attn.run(q, cache)
    attn, q, cache = layer(1, Reuse(TopK(k=9), every=2), 2)
    output, second = attn.run(q, cache, step=Step(1, first))
    keep = selected(first.ids, 65, 4)
    assert second is first
    exact = attention64(q, cache.keys, cache.values, keep)[0]
    assert (output.out - exact).abs().max() <= tolerance(q, cache.keys, cache.values, keep)


def test_inner_chooses_where_there_is_nothing_to_reuse():
    attn, q, cache = layer(1, Reuse(TopK(k=9), every=2))
    alone = attn.replace(selector=TopK(k=9)).run(q, cache)[1]
    other = layer(0, TopK(k=9), tokens=2)  # another number of queries
    fewer = layer(0, TopK(k=9), batch=1)
    for step in (Step(1), *(Step(1, a.run(x, c)[1]) for a, x, c in (other, fewer))):
        assert torch.equal(attn.run(q, cache, step=step)[1].ids, alone.ids)


def test_it_costs_what_inner_costs_at_most():
    reuse = Reuse(Tiers(0.1, 0.3), every=2)
    assert (reuse.budget(100), reuse.critical(100), reuse.shared, reuse.matrices) == (30, 10, False, 0)
    assert eval(repr(reuse)) == reuse
    assert reuse.rule(1) is None  # fused steps know of no other layer


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (TypeError, lambda: Reuse(Sink(4), every=2), ["inner", "Sink"]),
        (TypeError, lambda: Reuse(Momentum(TopK(k=3)), every=2), ["inner", "Momentum(Reuse("]),
        (TypeError, lambda: Reuse(CollisionSample(64, 8), every=2), ["inner", "samples"]),
        (ValueError, lambda: Reuse(TopK(k=3)), ["every", "layers"]),
        (ValueError, lambda: Reuse(TopK(k=3), 2, (1,)), ["every=2", "layers=(1,)"]),
        (ValueError, lambda: Reuse(TopK(k=3), every=0), ["every", "0"]),
        (ValueError, lambda: Reuse(TopK(k=3), layers=[0, 2]), ["layers", "[0, 2]"]),
        (ValueError, lambda: Reuse(TopK(k=3), layers=(0, -1)), ["layers", "-1"]),
    ],
)
def test_bad_input_is_refused_by_name(error, make, words):
    raises_naming(error, *words)(make)
