import dataclasses
import json
import shutil

import pytest
import torch

from hashattn import HashAttention, Selection, SymmetricHash, TopK, from_pretrained
from hashattn.core.types import Step
from hashattn.encoders.sample import Sample
from hashattn.lab.learning import calibrate
from hashattn.lab.learning.calibrate import GRID, fit_mixed, mass_of, momentum_masses, view_of
from hashattn.lab.learning.fit import fit_layers
from hashattn.lab.learning.recipe import Recipe
from hashattn.lab.learning.shards import Shards
from hashattn.selectors import Momentum
from tests.lab.learning.shards import make
from tests.structured import cones, qkv, selected

RECIPE = Recipe(bits=32, query_hidden=(), steps=4, queries=8, budget=0.25)
PAIR = (1, 2)


@pytest.fixture(scope="module", autouse=True)
def few_estimates():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "ESTIMATED", 2)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return Shards.open(make(tmp_path_factory.mktemp("captured") / "shards", ("text", "text", "needle")))


@pytest.fixture(scope="module")
def out(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "out"
    fit_layers(shards, out, RECIPE, layers=PAIR, calibrate=True)
    return out


def sample(seed=0, tokens=12, keys=200):
    data = cones(seed, tokens=tokens, keys=keys, dim=16)
    return Sample(data.q[0], data.k[0], torch.arange(keys - 3 * tokens, keys, 3), keys)


def encoder_of(*samples, bits=64):
    k = torch.stack([s.k for s in samples])
    q = torch.stack([s.q for s in samples])
    return SymmetricHash(bits).fit(q, k, steps=20, queries=8)


def test_calibration_is_fitted_saved_and_used(out):
    loaded = from_pretrained(out / "pretrained")
    found, calibration = loaded.fitted_on["calibration"], loaded.calibration
    for name in ("consensus", "momentum"):
        kept = {float(discount): mass for discount, mass in found[name].items()}
        assert list(kept) == list(GRID)
        assert len(set(kept.values())) > 1, "no discount changed anything"
        assert kept[getattr(calibration, name)] == max(kept.values())
        assert all(0 < mass <= 1 for mass in kept.values())
    assert tuple(calibration.mixed) == PAIR
    attn = HashAttention.from_preset("dashkv", pretrained=loaded, dense_layers=(0, 3, 4), engine="reference")
    assert attn.selector.ranked_part.discount.item() == calibration.momentum
    assert attn.selector.ranked_part.inner.discount.item() == calibration.consensus
    stage = attn.layer(2).attend
    assert stage.a.item() == pytest.approx(found["a"]["2"])
    q, k, v = qkv(0, keys=200)
    assert attn.layer(2)(q, k, v).isfinite().all()


def test_calibrating_what_was_fitted_before_gives_the_same(shards, out, tmp_path):
    later = tmp_path / "later"
    fit_layers(shards, later, RECIPE, layers=PAIR)
    assert from_pretrained(later / "pretrained").calibration.consensus is None
    fit_layers(shards, later, RECIPE, layers=PAIR, calibrate=True)
    for name in ("config.json", "weights.safetensors"):
        assert (later / "pretrained" / name).read_bytes() == (out / "pretrained" / name).read_bytes()


def test_held_out_sequences_play_no_part(shards, out, tmp_path):
    changed = tmp_path / "shards"
    shutil.copytree(shards.folder, changed)
    shutil.rmtree(changed / "002-needle")  # the one that is held out
    shutil.copytree(changed / "000-text", changed / "002-needle")
    saved = fit_layers(Shards.open(changed), tmp_path / "out", RECIPE, layers=PAIR, calibrate=True)
    a, b = (json.loads((p / "config.json").read_text()) for p in (saved, out / "pretrained"))
    assert a["fitted_on"]["calibration"] == b["fitted_on"]["calibration"]
    assert a["fitted_on"]["held_out"]["layers"] != b["fitted_on"]["held_out"]["layers"]


def test_a_model_whose_searched_layers_do_not_follow_each_other_has_no_momentum(shards, tmp_path):
    saved = fit_layers(shards, tmp_path / "out", RECIPE, layers=(2, 4), calibrate=True)
    calibration = from_pretrained(saved).calibration
    assert calibration.momentum is None
    assert calibration.consensus is not None


def test_where_forced_keys_take_the_whole_budget_no_discount_is_chosen(shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, budget=0.05)
    loaded = from_pretrained(fit_layers(shards, tmp_path / "out", recipe, layers=[1], calibrate=True))
    assert (loaded.calibration.consensus, loaded.calibration.momentum) == (None, None)
    attn = HashAttention.from_preset("dashkv", pretrained=loaded)
    plain = HashAttention.from_preset("dashkv")
    assert repr(attn.selector) == repr(plain.selector)


def test_a_view_of_a_sample_sees_the_keys_up_to_each_query():
    one = sample()
    encoder = encoder_of(one)
    view = view_of(encoder, one)
    assert view.seen[0, 0].sum(-1).tolist() == (one.positions + 1).tolist()
    everything = TopK(share=1.0).select(view, Step())
    mass, weights = mass_of(one, everything)
    assert mass == pytest.approx(1.0, abs=1e-5)
    assert weights.sum(-1) == pytest.approx(1.0, abs=1e-5)


def test_mass_is_the_softmax_over_visible_keys_at_the_selected_ones():
    one = sample(1)
    ids = torch.stack([torch.randperm(100)[:9] for _ in range(2 * 12)]).view(1, 2, 12, 9).to(torch.int32)
    ids[..., 7:] = -1
    mass, weights = mass_of(one, Selection(ids))  # chosen a KV head
    logits = one.q.double() @ one.k.double().repeat_interleave(2, 0).transpose(1, 2) / 4
    seen = torch.arange(200) <= one.positions.unsqueeze(-1)
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    keep = selected(ids, 200, 4)[0]
    assert mass == pytest.approx((p * keep).sum(-1).mean().item(), abs=1e-6)
    assert (weights[..., 7:] == 0).all()


@pytest.mark.parametrize(("numbers", "helps"), [((1, 2), True), ((1, 3), False)])
def test_momentum_helps_a_bad_layer_after_a_good_one_that_attends_alike(numbers, helps):
    one = sample(2)
    good, bad = encoder_of(one, bits=128), encoder_of(sample(3), bits=8)
    top = TopK(share=0.1)
    layers = [(numbers[0], good, [one]), (numbers[1], bad, [one])]
    masses = momentum_masses(layers, [Momentum(top, discount=d) for d in (0.0, 8.0)])
    assert (masses[1] > masses[0] + 0.02) == helps
    if not helps:
        assert masses[0] == masses[1]


def test_layers_of_different_queries_are_refused():
    one, other = sample(2), dataclasses.replace(sample(2), positions=torch.arange(12))
    encoder = encoder_of(one)
    with pytest.raises(ValueError, match=r"layer 2 .* other queries"):
        momentum_masses([(1, encoder, [one]), (2, encoder, [other])], [Momentum(TopK(k=3))])


def test_the_estimate_of_a_layer_repeats():
    samples = [sample(5, keys=150), sample(4), sample(6, keys=160, tokens=8)]
    encoder = encoder_of(sample(4), sample(7))
    before = torch.get_rng_state()
    a, b = (fit_mixed(samples, encoder, share=0.2, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert a.a.item() == b.a.item() > 0
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
