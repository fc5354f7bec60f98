"""Fitting to several texts: what is watched, what stops it, and what it leaves behind."""

import dataclasses

import pytest
import torch

from hashattn import AsymmetricHash, SymmetricHash
from hashattn.encoders import losses
from hashattn.encoders.fitting import fit
from hashattn.encoders.sample import Sample
from hashattn.lab.recall import recall_and_mass, spaced
from tests.structured import generator, raises_naming


def sample(seed, keys=150, queries=20, heads=2, dim=16):
    g = generator(seed)
    positions = (64 + torch.randperm(keys - 64, generator=g)[:queries]).sort().values
    q, k = torch.randn(2 * heads, queries, dim, generator=g), torch.randn(heads, keys, dim, generator=g)
    return Sample(q, k, positions, keys, f"text {seed}")


def encoder(**options):
    return AsymmetricHash(64, query_hidden=(8,), **options)


def weights(of):
    return {name: x.clone() for name, x in of.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_texts_of_other_lengths_are_fitted_together_and_a_seed_repeats_it():
    texts = [sample(0), sample(1, keys=90, queries=5)]
    a, b, c = encoder(), encoder(), encoder()
    for one, seed in ((a, 3), (b, 3), (c, 4)):
        fit(one, texts, steps=4, queries=8, seed=seed)
    assert same(weights(a), weights(b))
    assert not same(weights(a), weights(c))
    assert torch.allclose(a.mean, torch.stack([t.k.mean(1) for t in texts]).mean(0))


def test_it_is_watched_every_so_often_and_stops_when_told():
    seen = []
    fit(encoder(), [sample(0)], steps=7, every=3, watch=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [3, 6, 7]
    seen.clear()
    fit(encoder(), [sample(0)], steps=50, every=2, watch=lambda step, loss: seen.append(step) or step >= 4)
    assert seen == [2, 4]


def test_a_loss_that_is_not_finite_stops_it_at_the_last_good_state(monkeypatch):
    states, calls, ranking = [], [], losses.LOSSES["ranking"]

    def breaks(batch):
        calls.append(0)
        return ranking(batch) * (torch.nan if len(calls) == 6 else 1.0)

    monkeypatch.setitem(losses.LOSSES, "ranking", breaks)
    one = encoder()
    raises_naming(FloatingPointError, "ranking", "nan", "step 5", "step 4")(
        lambda: fit(one, [sample(0)], steps=20, every=2, watch=lambda *_: states.append(weights(one)) and None)
    )
    assert len(states) == 2
    assert same(weights(one), states[-1])
    assert one.fitted


@pytest.mark.parametrize("loss", ["ranking", "kl + 0.1 * balance + 0.1 * quantisation", "bce", "similarity"])
@pytest.mark.parametrize("make", [encoder, lambda: encoder(query_bits=4), lambda: SymmetricHash(64, bias_bits=8)])
def test_every_loss_fits_every_kind(loss, make):
    one = make()
    fit(one, [sample(0)], steps=3, queries=8, loss=loss)
    assert all(x.isfinite().all() for x in one.state_dict().values())
    assert one.fitted


def test_samples_that_cannot_be_fitted_are_refused_before_any_work():
    one, good = encoder(), sample(0)
    cases = [
        ([], ["samples", "none"]),
        ([good, sample(1, heads=1)], ["share", "text 0", "text 1"]),
        ([Sample(good.q[:, :0], good.k, good.positions[:0], 150, "bare")], ["bare", "no queries"]),
        ([Sample(good.q[:, :1], good.k, torch.tensor([5]), 150, "early")], ["early", "64 keys"]),
    ]
    for samples, words in cases:
        raises_naming(ValueError, *words)(lambda samples=samples: fit(one, samples, steps=2))
    raises_naming(ValueError, "every", "0")(lambda: fit(one, [good], every=0))
    assert not one.fitted
    assert one.query_net is None


def test_a_sample_of_wrong_shapes_is_refused():
    q, k, at = torch.zeros(4, 2, 8), torch.zeros(2, 9, 8), torch.tensor([3, 8])
    raises_naming(ValueError, "Hkv", "(3, 2, 8)")(lambda: Sample(q[:3], k, at, 9))
    raises_naming(ValueError, "positions", "2 integers")(lambda: Sample(q, k, at[:1], 9))
    raises_naming(ValueError, "positions", "9 keys", "9")(lambda: Sample(q, k, at + 1, 9))


def test_a_question_counts_as_a_text_of_its_own(monkeypatch):
    plain = sample(0)
    asked = dataclasses.replace(plain, asked=140, prefill=148)
    question = asked.question()
    inside = (plain.positions >= 140) & (plain.positions < 148)
    assert torch.equal(question.positions, plain.positions[inside])
    assert torch.equal(question.q, plain.q[:, inside])
    assert question.k is plain.k
    assert plain.question() is None
    assert dataclasses.replace(plain, asked=150).question() is None
    drawn = []
    monkeypatch.setitem(losses.LOSSES, "ranking", lambda batch: drawn.append(batch.seen) or batch.student.mean())
    fit(encoder(), [asked], steps=30, queries=6)
    late = [bool((seen.sum(-1) > 140).all()) for seen in drawn]
    assert 8 <= sum(late) <= 22  # about half of them
    early = Sample(plain.q[:, :2], plain.k, torch.tensor([30, 149]), 40, asked=20)  # a question that sees too few keys
    drawn.clear()
    fit(encoder(), [early], steps=8, queries=6)
    assert all((seen.sum(-1) == 150).all() for seen in drawn)


def test_recall_and_mass_are_those_of_a_search_by_hand():
    one, text = SymmetricHash(64), sample(5, keys=200, queries=30)
    fit(one, [text], steps=2, queries=4)
    rows = spaced(text.positions, 200, 7)
    signs_q = torch.where(one.project_query(text.q[None])[0] >= 0, 1.0, -1.0)
    signs_k = torch.where(one.project_key(text.k[None])[0] >= 0, 1.0, -1.0)
    recalls, masses = [], []
    for head in range(4):
        for row in rows.tolist():
            visible = int(text.positions[row]) + 1
            logits = text.k[head // 2, :visible] @ text.q[head, row] / 4
            found = signs_k[head // 2, :visible] @ signs_q[head, row] + torch.arange(visible) / 1e4  # ties: the later
            k = -(-visible // 10)
            near, best = set(found.topk(k).indices.tolist()), set(logits.topk(k).indices.tolist())
            weights = logits.softmax(0)
            recalls.append(len(near & best) / k)
            masses.append(weights[sorted(near)].sum() / weights[sorted(best)].sum())
    recall, mass = recall_and_mass(one, [text], budget=0.1, queries=7)
    assert recall == pytest.approx(sum(recalls) / len(recalls), abs=1e-6)
    assert mass == pytest.approx(float(sum(masses)) / len(masses), rel=1e-5)
    everything = recall_and_mass(one, [text], k=200)
    assert everything == pytest.approx((1.0, 1.0), rel=1e-5)
    raises_naming(ValueError, "samples", "none")(lambda: recall_and_mass(one, []))
