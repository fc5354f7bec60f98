"""Every integer that a user gives is asked for in the same way."""

import numpy as np
import pytest
import torch

from hashattn import (
    ITQ,
    L2ALSH,
    PCA,
    PQ,
    AsymmetricHash,
    Centring,
    Channels,
    CollisionSample,
    CrossPolytope,
    FaissBinary,
    FlatHamming,
    HashAttention,
    HeavyChannels,
    HeavyHitters,
    Identity,
    KVCache,
    LocalTopK,
    MixedPrecision,
    MultiProbe,
    ObservationWindow,
    Pages,
    RaBitQ,
    RandomTail,
    Recent,
    Refine,
    Reuse,
    SimHash,
    SimpleLSH,
    Sink,
    SpectralHash,
    SymmetricHash,
    Threshold,
    TopK,
)
from hashattn.core.checks import NotAnInteger, check_int
from hashattn.ops.decode.estimate import NORMS
from tests.structured import qkv, raises_naming

TAKES = {  # a part, and an integer that it takes
    "AsymmetricHash bias_bits": (lambda n: AsymmetricHash(64, bias_bits=n), 8),
    "AsymmetricHash heads": (lambda n: AsymmetricHash(64, heads=n), 2),
    "AsymmetricHash hidden": (lambda n: AsymmetricHash(64, query_hidden=(n,)), 2),
    "Centring keys": (lambda n: Centring(keys=n), 2),
    "Centring skip": (lambda n: Centring(skip=n), 2),
    "Channels": (Channels, 8),
    "CollisionSample bits": (lambda n: CollisionSample(20, n), 4),
    "CollisionSample tables": (CollisionSample, 20),
    "CrossPolytope buckets": (lambda n: CrossPolytope(12, n), 16),
    "CrossPolytope rounds": (CrossPolytope, 12),
    "CrossPolytope seed": (lambda n: CrossPolytope(seed=n), 3),
    "FaissBinary ef_search": (lambda n: FaissBinary("BHNSW16", ef_search=n), 8),
    "FaissBinary nflip": (lambda n: FaissBinary("BHash8", nflip=n), 1),
    "FaissBinary nprobe": (lambda n: FaissBinary("BIVF4", nprobe=n), 2),
    "HashAttention dense_layers": (lambda n: HashAttention(dense_layers=(n,), selector=Sink(4)), 2),
    "HeavyChannels": (HeavyChannels, 8),
    "HeavyHitters": (lambda n: HeavyHitters(k=n), 8),
    "ITQ bits": (ITQ, 64),
    "ITQ iterations": (lambda n: ITQ(iterations=n), 8),
    "KVCache batch": (lambda n: KVCache(n, 2, 8), 2),
    "KVCache capacity": (lambda n: KVCache(2, 2, 8, capacity=n), 2),
    "KVCache head_dim": (lambda n: KVCache(2, 2, n), 2),
    "KVCache kv_heads": (lambda n: KVCache(2, n, 8), 2),
    "L2ALSH powers": (lambda n: L2ALSH(powers=n), 2),
    "LocalTopK k": (lambda n: LocalTopK(n, 4), 16),
    "LocalTopK per_chunk": (lambda n: LocalTopK(16, n), 4),
    "MixedPrecision": (lambda n: MixedPrecision(hidden=n), 4),
    "MultiProbe bits": (lambda n: MultiProbe(4, n, 2), 4),
    "MultiProbe probes": (lambda n: MultiProbe(4, 4, n), 4),
    "MultiProbe tables": (lambda n: MultiProbe(n, 4, 2), 4),
    "ObservationWindow k": (lambda n: ObservationWindow(k=n), 8),
    "ObservationWindow pool": (lambda n: ObservationWindow(k=8, pool=n), 3),
    "ObservationWindow window": (lambda n: ObservationWindow(k=8, window=n), 3),
    "PCA": (PCA, 4),
    "PQ": (PQ, 4),
    "PQ sub_bits": (lambda n: PQ(sub_bits=n), 4),
    "Pages": (Pages, 4),
    "RaBitQ": (RaBitQ, 64),
    "RandomTail k": (lambda n: RandomTail(TopK(k=2), k=n), 4),
    "RandomTail seed": (lambda n: RandomTail(TopK(k=2), k=2, seed=n), 4),
    "Recent": (Recent, 4),
    "Refine": (lambda n: Refine(TopK(k=2), factor=n), 4),
    "Reuse every": (lambda n: Reuse(TopK(k=2), every=n), 2),
    "Reuse layers": (lambda n: Reuse(TopK(k=2), layers=(n,)), 2),
    "SimHash bits": (SimHash, 64),
    "SimHash query_bits": (lambda n: SimHash(64, n), 2),
    "SimHash seed": (lambda n: SimHash(seed=n), 2),
    "SimpleLSH": (SimpleLSH, 64),
    "Sink": (Sink, 4),
    "SpectralHash": (SpectralHash, 64),
    "SymmetricHash seed": (lambda n: SymmetricHash(seed=n), 4),
    "Threshold limit": (lambda n: Threshold(3, limit=n), 4),
    "Threshold radius": (Threshold, 4),
    "TopK": (TopK, 4),
    "a new store": (lambda n: FlatHamming().new_store(n), 50),
}


@pytest.mark.parametrize("name", TAKES)
def test_what_counts_is_taken_and_what_does_not_is_refused(name):
    make, fitting = TAKES[name]
    made = make(fitting)
    if name != "HashAttention dense_layers":  # whose tuple is compared as it is
        assert repr(make(np.int64(fitting))) == repr(made) or "object at" in repr(made)
    for wrong in (True, np.True_, torch.tensor(True), float(fitting), fitting + 0.5, str(fitting), (fitting,)):
        with pytest.raises((TypeError, ValueError)) as error:
            make(wrong)
        assert repr(wrong) in str(error.value), name


def test_integers_of_every_kind_become_ints():
    for value in (3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)):
        found = check_int("k", value, 1)
        assert type(found) is int
        assert found == 3
    raises_naming(NotAnInteger, "k", "at least 1", "3.5")(lambda: check_int("k", 3.5, 1))
    raises_naming(ValueError, "k", "from 1 to 4", "5")(lambda: check_int("k", 5, 1, 4))
    assert issubclass(NotAnInteger, TypeError)
    assert issubclass(NotAnInteger, ValueError)


HUGE = [2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**64, 2**70]
LARGE = {
    "TopK": lambda n: TopK(k=n),
    "TopK of a group": lambda n: TopK(k=n, per="kv_head"),
    "TopK of any head": lambda n: TopK(k=n, per="kv_head", combine="union"),
    "Threshold": Threshold,
    "Threshold of a group": lambda n: Threshold(n, per="kv_head"),
    "Threshold of any head": lambda n: Threshold(n, per="kv_head", combine="union"),
    "Threshold, limited": lambda n: Threshold(n, limit=n),
    "Sink": Sink,
    "Recent": Recent,
    "Sink and Recent": lambda n: Sink(n) | Recent(n) | TopK(k=1),
    "Sink and LocalTopK": lambda n: Sink(n) | LocalTopK(4, 2),
    "Refine": lambda n: Refine(TopK(k=n), factor=n),
    "HeavyHitters": lambda n: HeavyHitters(k=n),
}


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("name", LARGE)
def test_integers_beyond_every_cache_keep_everything(name, engine):
    q, k, v = qkv(3, 2, tokens=2, keys=40)
    start = torch.tensor([0, 9])
    expected = HashAttention(selector=Sink(100), engine=engine)(q, k, v, start=start)
    for n in HUGE:
        attn = HashAttention(SimHash(64, centring=None), FlatHamming(), LARGE[name](n), engine=engine)
        assert torch.allclose(attn(q, k, v, start=start), expected, atol=1e-5), n


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 5, 0), (2, 2, 0, 8)])
def test_nothing_is_no_key(shape):
    attn = HashAttention(selector=Sink(4))
    k, q = torch.ones(shape), torch.ones(shape[0], 4, 1, shape[3])
    raises_naming(ValueError, "k", "0")(lambda: attn(q, k, k))
    cache = attn.new_cache(2, 2, 8)
    raises_naming(ValueError, "k", "0")(lambda: cache.append(k, k))
    assert len(cache) == 0


def test_norms_take_two_bytes():
    assert NORMS.itemsize == 2


NONE_MEANS = {
    "a new store",
    "AsymmetricHash heads",
    "HashAttention dense_layers",
    "KVCache capacity",
    "Threshold limit",
}


@pytest.mark.parametrize("name", [name for name in TAKES if name not in NONE_MEANS and "Faiss" not in name])
def test_none_is_an_integer_only_where_it_means_something(name):
    with pytest.raises((TypeError, ValueError), match="None"):
        TAKES[name][0](None)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Centring(strength=n),
        lambda n: L2ALSH(64, norm=n),
        lambda n: L2ALSH(64, width=n),
        lambda n: MixedPrecision(a=n),
        lambda n: ObservationWindow(share=0.1, layers=4, beta=n),
    ],
    ids=["strength", "norm", "width", "a", "beta"],
)
def test_a_number_is_finite_and_no_boolean(make):
    for bad in (True, np.True_, "1", b"1", [1.0], torch.tensor(0.5), None, 1j):
        with pytest.raises(TypeError, match="must be a finite number"):
            make(bad)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a finite number"):
            make(bad)


@pytest.mark.parametrize("make", [SimHash, RaBitQ, CrossPolytope, lambda **c: AsymmetricHash(64, **c)])
@pytest.mark.parametrize("bad", [True, 0, 0.5, "none", Centring])
def test_a_centring_is_one_or_none(make, bad):
    raises_naming(TypeError, "centring must be a Centring, or None", repr(bad))(lambda: make(centring=bad))


def test_numbers_beyond_every_cache_mean_all_of_it():
    q, k, v = qkv(0, keys=30)
    attn = HashAttention(Identity(), Pages(10**30), TopK(k=3), engine="reference")
    assert torch.equal(attn(q, k, v), attn.replace(index=Pages(30))(q, k, v))
