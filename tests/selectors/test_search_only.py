"""Selectors that look again at what an index finds, over an index that gives no distance to every key."""

import pytest
import torch

from hashattn import (
    FlatHamming,
    HashAttention,
    LogitMap,
    MultiProbe,
    RandomTail,
    Recent,
    Refine,
    Reuse,
    SampledAttend,
    SimHash,
    Sink,
    TopK,
    TopP,
)
from tests.structured import cones, qkv, raises_naming, sdpa, selected, tolerance, visible_mask

ENCODER = SimHash(128, centring=None)
PROBES = MultiProbe()


def run(selector, q, k, v, start=None, index=PROBES):
    attn = HashAttention(ENCODER, index, Sink(1) | Recent(2) | selector, SampledAttend(), engine="reference")
    cache = attn.new_cache(k.shape[0], k.shape[1], k.shape[3])
    cache.append(k, v, start=start)
    output, selection = attn.run(q, cache)
    return output.out, selected(selection.ids, k.shape[2], q.shape[1])


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
@pytest.mark.parametrize(
    "wrap",
    [lambda s: TopP(s, 0.8), Refine, lambda s: RandomTail(s, k=9), lambda s: Reuse(s, every=2)],
    ids=["top-p", "refine", "tail", "reuse"],
)
def test_they_choose_among_what_is_found(wrap, per):
    data = cones(7, keys=300, tokens=5)
    kept = run(wrap(TopK(k=20, per=per)), data.q, data.k, data.v)[1]
    wide = run(TopK(k=80, per=per), data.q, data.k, data.v)[1]
    own = wrap(TopK(k=20, per=per))
    seen = visible_mask(5, 300, [0])
    assert (kept <= seen).all()
    assert (kept.sum(-1) > 2).all()
    assert (kept.sum(-1) <= own.budget(300)).all()
    if isinstance(own, Refine):
        assert (kept <= wide).all()


def test_a_tail_of_all_that_was_not_found_is_dense_attention():
    q, k, v = qkv(0, 2, tokens=2, keys=65)
    start = torch.tensor([0, 20])
    keep = visible_mask(2, 65, [0, 20])
    out = run(RandomTail(TopK(k=9), share=1.0), q, k, v, start)[0]
    assert (out - sdpa(q, k, v, keep)).abs().max() <= 2 * tolerance(q, k, v, keep)


@pytest.mark.parametrize(
    "selector", [Refine(TopK(k=3), ties=True), TopP(TopK(k=3), logits=LogitMap((1.0,), (0.0,)))], ids=["ties", "map"]
)
def test_what_asks_for_every_distance_is_refused_when_composed(selector):
    good = HashAttention(ENCODER, FlatHamming(), selector)
    raises_naming(ValueError, type(selector).__name__, "MultiProbe", "distance")(lambda: good.replace(index=PROBES))
