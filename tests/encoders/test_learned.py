import sys
import warnings

import pytest
import torch

from hashattn import AsymmetricHash, Centring, FlatHamming, HashAttention, SimHash, SymmetricHash, TopK
from hashattn.encoders import losses
from tests.structured import attention64, generator, qkv, raises_naming, tolerance, visible_mask

unfitted = pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
MAKE = {
    "asymmetric": lambda **o: AsymmetricHash(65, query_hidden=(12,), **o),
    "deep keys": lambda **o: AsymmetricHash(65, query_hidden=(12, 8), key_hidden=(12,), **o),
    "symmetric": lambda **o: SymmetricHash(65, **o),
}
makes = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def fit(encoder, seed=0, **options):
    q, k, _ = qkv(seed, tokens=8, keys=80)
    return encoder.fit(q, k, **{"steps": 4, "queries": 4, **options})


def state(encoder):
    return {name: x.clone() for name, x in encoder.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@makes
def test_an_unfitted_hash_is_simhash_and_warns_once(make):
    q, k, _ = qkv(0)
    encoder, centre = make(), torch.randn(1, 2, 16, generator=generator(1))
    with pytest.warns(UserWarning, match="not fitted") as caught:
        codes = encoder.encode_key(k, centre)
        encoder.encode_key(k, centre)
    assert len(caught) == 1
    simhash = SimHash(65)
    assert torch.equal(codes, simhash.encode_key(k, centre))
    assert torch.equal(encoder.encode_query(q), simhash.encode_query(q))
    assert encoder.centring == simhash.centring


@makes
def test_a_fitted_hash_uses_its_own_centre_and_no_row_is_too_short(make):
    encoder = fit(make())
    _, k, _ = qkv(0, tokens=8, keys=80)
    assert torch.equal(encoder.mean, k.mean((0, 2)))
    assert encoder.centring is None
    assert torch.equal(encoder.encode_key(k), encoder.encode_key(k, torch.full((1, 2, 16), 1e6)))


@makes
@pytest.mark.parametrize("loss", ["ranking", "kl"])
def test_fitting_changes_the_weights_and_repeats_with_the_same_seed(make, loss):
    a, b, c = fit(make(), loss=loss), fit(make(), loss=loss), fit(make(seed=1), loss=loss)
    start = make().build(16)
    assert same(state(a), state(b))
    assert not same(state(a), state(c))
    for name, x in start.named_parameters():
        assert not torch.equal(x, dict(a.named_parameters())[name]), f"{name} was not trained"
    assert all(x.isfinite().all() for x in a.state_dict().values())


@unfitted
@makes
@pytest.mark.parametrize("stage", ["new", "built", "fitted"])
def test_a_state_dict_gives_a_fresh_instance_the_same_codes(make, stage):
    q, k, _ = qkv(3)
    encoder = {"new": lambda e: e, "built": lambda e: e.build(16), "fitted": fit}[stage](make(heads=2, query_bits=4))
    twin = make(heads=2, query_bits=4)
    twin.load_state_dict(encoder.state_dict())
    assert twin.fitted == encoder.fitted == (stage == "fitted")
    assert torch.equal(twin.encode_key(k), encoder.encode_key(k))
    assert torch.equal(twin.encode_query(q), encoder.encode_query(q))


@makes
@pytest.mark.parametrize(
    ("stage", "error"), [("new", ValueError), ("built", KeyboardInterrupt), ("fitted", KeyboardInterrupt)]
)
def test_an_exception_in_the_middle_of_a_fit_leaves_the_encoder_as_it_was(monkeypatch, make, error, stage):
    encoder = {"new": lambda e: e, "built": lambda e: e.build(16), "fitted": fit}[stage](make())
    before, calls = state(encoder), []
    objective = losses.LOSSES["ranking"]

    def breaks(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return objective(*args)

    monkeypatch.setitem(losses.LOSSES, "ranking", breaks)
    with pytest.raises(error):
        fit(encoder, 4)
    assert len(calls) == 3
    assert same(state(encoder), before)
    assert encoder.fitted == (stage == "fitted")


def test_a_failed_fit_can_be_repeated_as_if_it_had_not_been(monkeypatch):
    encoder = MAKE["asymmetric"]()
    with monkeypatch.context() as patch:
        patch.setitem(losses.LOSSES, "kl", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(encoder, loss="kl")
    assert same(state(fit(encoder)), state(fit(MAKE["asymmetric"]())))


@unfitted
@makes
@pytest.mark.parametrize("weight_sets", [None, 1, 2, 4])
@pytest.mark.parametrize("fitted", [False, True])
def test_each_head_takes_its_own_weights(make, weight_sets, fitted):
    q, k, _ = qkv(5, kv_heads=2, group=2, tokens=3)
    encoder = make(heads=weight_sets)
    if fitted:
        fit(encoder)
    centre = None if fitted else torch.zeros(1, 2, 16)
    codes, query = encoder.encode_key(k, centre), encoder.encode_query(q)
    assert codes.shape[1] == encoder.code_heads(2) == (4 if weight_sets == 4 else 2)
    mean = encoder.mean if fitted else torch.zeros(2, 16)
    planes = encoder.key_net.skip
    if make is MAKE["symmetric"]:  # a linear map: by hand
        own = planes.repeat_interleave(codes.shape[1] // len(planes), 0)
        centred = (k - mean.unsqueeze(1)).repeat_interleave(codes.shape[1] // 2, 1)
        assert torch.allclose(encoder.project_key(k, centre), centred @ own, atol=1e-4)
    one = encoder.encode_query(q[:, :, 1:2])  # and each token for itself
    assert torch.equal(query[:, :, 1:2], one)


@unfitted
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_codes_per_query_head_give_dense_attention_at_a_full_budget(per):
    q, k, v = qkv(6, kv_heads=2, group=2, keys=65)
    encoder = AsymmetricHash(64, query_hidden=(8,), heads=4, centring=Centring(1.0, 20))
    attn = HashAttention(encoder, FlatHamming(), TopK(share=1.0, per=per), engine="reference")
    keep = visible_mask(1, 65, [0])
    assert (attn(q, k, v) - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)


def test_codes_stay_finite_signs_for_a_zero_query():
    encoder = fit(MAKE["asymmetric"]())
    assert encoder.encode_query(torch.zeros(1, 4, 1, 16)).shape == (1, 4, 1, 2)


@makes
def test_encoding_makes_no_graph(make):
    q, k, _ = qkv(7)
    encoder = fit(make())
    assert not encoder.encode_key(k.requires_grad_()).requires_grad
    assert not encoder.encode_query(q.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "hinge"}, ["loss", "hinge", "ranking", "kl"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"queries": 0}, ["queries", "0"]),
    ],
)
def test_bad_fit_options_are_refused_by_name(options, words):
    encoder = MAKE["asymmetric"]()
    raises_naming(ValueError, *words)(lambda: fit(encoder, **options))
    assert not encoder.fitted


@pytest.mark.parametrize(
    ("q", "k", "words"),
    [
        ((1, 4, 8, 16), (1, 4, 80, 8), ["D", "16", "8"]),
        ((2, 4, 8, 16), (1, 4, 80, 16), ["B", "(2, 4, 8, 16)"]),
        ((1, 3, 8, 16), (1, 2, 80, 16), ["Hq", "(1, 3, 8, 16)"]),
        ((1, 4, 81, 16), (1, 4, 80, 16), ["T <= N", "81"]),
        ((4, 8, 16), (1, 4, 80, 16), ["[4, 8, 16]"]),
    ],
)
def test_shapes_that_cannot_be_fitted_are_refused(q, k, words):
    raises_naming(ValueError, *words)(lambda: MAKE["symmetric"]().fit(torch.zeros(q), torch.zeros(k)))


def test_a_model_that_the_weights_do_not_suit_is_refused():
    q, k, v = qkv(8)
    attn = HashAttention(fit(MAKE["symmetric"]()), FlatHamming(), TopK(k=3), engine="reference")
    raises_naming(ValueError, "head_dim 16", "8")(lambda: attn(*qkv(8, dim=8)))
    raises_naming(ValueError, "2 KV heads", "1")(lambda: attn(*qkv(8, kv_heads=1)))
    raises_naming(ValueError, "heads", "3")(lambda: attn.replace(encoder=SymmetricHash(heads=3))(q, k, v))
    raises_naming(ValueError, "heads", "0")(lambda: SymmetricHash(heads=0))
    raises_naming(ValueError, "bits", "2000")(lambda: SymmetricHash(2000))
    raises_naming(ValueError, "query_bits", "3")(lambda: AsymmetricHash(query_bits=3))


def test_a_progress_bar_without_tqdm_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    encoder = MAKE["symmetric"]()
    raises_naming(ImportError, "progress", 'pip install "hashattn[fit]"')(lambda: fit(encoder, progress=True))
    assert not encoder.fitted


def test_a_fitted_hash_does_not_warn():
    _, k, _ = qkv(9)
    encoder = fit(MAKE["symmetric"]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_key(k)
