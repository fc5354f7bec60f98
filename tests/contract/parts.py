"""One of every encoder, index, selector and attend stage that the library exports, ready for use: small and fitted."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

import hashattn
from hashattn import (
    ITQ,
    L2ALSH,
    PCA,
    PQ,
    AsymmetricHash,
    Centring,
    Channels,
    CollisionSample,
    Consensus,
    CrossPolytope,
    DenseAttend,
    Encoder,
    ExactAttend,
    FaissBinary,
    FlatBuckets,
    FlatDot,
    FlatHamming,
    FlatPQ,
    FlatRaBitQ,
    HeavyChannels,
    HeavyHitters,
    Identity,
    Index,
    LocalTopK,
    LogitMap,
    MixedPrecision,
    Momentum,
    MultiProbe,
    ObservationWindow,
    Pages,
    RaBitQ,
    RandomTail,
    Recent,
    Refine,
    Reuse,
    SampledAttend,
    Selector,
    SimHash,
    SimpleLSH,
    Sink,
    SpectralHash,
    SymmetricHash,
    Threshold,
    Tiers,
    TopK,
    TopP,
)
from hashattn.testing.inputs import Shape, inputs

DATA = inputs(Shape(), tokens=64, seed=1)  # what encoders are fitted to
SMALL = Centring(keys=24)


def fit(encoder: Any, **options: Any) -> Encoder:
    with torch.random.fork_rng():
        return encoder.fit(DATA.q, DATA.k, **options)


ENCODERS: Mapping[str, Callable[[], Encoder]] = {
    "AsymmetricHash": cache(lambda: fit(AsymmetricHash(64, query_hidden=(16,), bias_bits=8), steps=2)),
    "CrossPolytope": lambda: CrossPolytope(12, 16, SMALL),
    "HeavyChannels": cache(lambda: fit(HeavyChannels(8))),
    "ITQ": cache(lambda: fit(ITQ(70, query_bits=4, iterations=5))),
    "Identity": Identity,
    "L2ALSH": cache(lambda: fit(L2ALSH(100))),
    "PCA": cache(lambda: fit(PCA(12))),
    "PQ": cache(lambda: fit(PQ(8, sub_bits=4))),
    "RaBitQ": lambda: RaBitQ(centring=SMALL),
    "SimHash": lambda: SimHash(100, 8, SMALL),
    "SimpleLSH": cache(lambda: fit(SimpleLSH(100, query_bits=2))),
    "SpectralHash": cache(lambda: fit(SpectralHash(64))),
    "SymmetricHash": cache(lambda: fit(SymmetricHash(64, heads=2), steps=2)),
}

CODES = SimHash(128, centring=SMALL)
INDEXES: Mapping[str, tuple[Index, Callable[[], Encoder]]] = {
    "Channels": (Channels(8), Identity),
    "FaissBinary": (FaissBinary("BFlat"), lambda: CODES),
    "FaissBinary, cells": (FaissBinary("BIVF2", nprobe=2), lambda: CODES),
    "FaissBinary, graph": (FaissBinary("BHNSW16", ef_search=64), lambda: CODES),
    "FaissBinary, hashes": (FaissBinary("BHash8x8"), lambda: CODES),
    "FlatBuckets": (FlatBuckets(), ENCODERS["CrossPolytope"]),
    "FlatDot": (FlatDot(), ENCODERS["PCA"]),
    "FlatHamming": (FlatHamming(), ENCODERS["SimHash"]),
    "FlatPQ": (FlatPQ(), ENCODERS["PQ"]),
    "FlatRaBitQ": (FlatRaBitQ(), ENCODERS["RaBitQ"]),
    "MultiProbe": (MultiProbe(8, 4, 8), lambda: SimHash(100, 8, SMALL)),
    "Pages": (Pages(4), Identity),
}

SAMPLES = SimHash(CollisionSample(20, 4).code_bits, centring=None, orthogonal=False)
EVERY = TopK(share=1.0)
FALLING = LogitMap((20.0, 60.0, 100.0), (4.0, 0.0, -3.0))
# A selector, one like it that keeps every key (if there is one), and what it is composed with.
SELECTORS: Mapping[str, tuple[Selector, Selector | None, Mapping[str, Any]]] = {
    "CollisionSample": (CollisionSample(20, 4), None, {"encoder": SAMPLES, "attend": SampledAttend()}),
    "Consensus": (Consensus(TopK(k=12), vote_share=0.3), Consensus(EVERY), {}),
    "HeavyHitters": (HeavyHitters(k=12), HeavyHitters(share=1.0), {}),
    "LocalTopK": (LocalTopK(16, 4), LocalTopK(160, 160), {"shape": Shape(start=32)}),  # chunks are dealt by column
    "Momentum": (Momentum(TopK(k=12)), Momentum(EVERY), {}),
    "ObservationWindow": (ObservationWindow(k=12, window=2, pool=3), ObservationWindow(share=1.0, window=1), {}),
    "RandomTail": (RandomTail(TopK(k=8), k=6), RandomTail(EVERY, k=1), {"attend": SampledAttend()}),
    "Recent": (Recent(7), Recent(120), {}),
    "Refine": (Refine(TopK(k=7)), Refine(EVERY), {}),
    "Refine, ties": (Refine(TopK(k=7, per="kv_head"), ties=True), Refine(EVERY, ties=True), {}),
    "Reuse": (Reuse(TopK(k=12), every=2), Reuse(EVERY, every=2), {}),
    "Sink": (Sink(3), Sink(120), {}),
    "Sink and Recent": (Sink(3) | Recent(7) | TopK(k=12), Sink(3) | EVERY, {}),
    "Threshold": (Threshold(58), Threshold(128), {}),
    "Threshold, votes": (Threshold(58, limit=9, per="kv_head", combine="vote"), None, {}),
    "Tiers": (Tiers(0.1, 0.3), Tiers(0.1, 1.0), {}),
    "TopK": (TopK(k=12), EVERY, {}),
    "TopK, sum": (TopK(share=0.1, per="kv_head"), TopK(share=1.0, per="kv_head"), {}),
    "TopK, union": (TopK(k=9, per="kv_head", combine="union"), TopK(share=1.0, per="kv_head", combine="union"), {}),
    "TopK, normalised": (TopK(k=9, per="kv_head", combine="normalised"), None, {}),
    "TopP": (TopP(TopK(k=20), 0.6), TopP(EVERY, 1.0), {}),
    "TopP, by a map": (TopP(TopK(k=20), 0.6, FALLING), TopP(EVERY, 1.0, FALLING), {}),
}

ATTENDS: Mapping[str, tuple[Callable[[], Any], Mapping[str, Any]]] = {
    "DenseAttend": (DenseAttend, {}),
    "ExactAttend": (ExactAttend, {}),
    "MixedPrecision": (lambda: MixedPrecision(), {"selector": Tiers(0.1, 0.4), "encoder": SimHash(128)}),
    "SampledAttend": (lambda: SampledAttend(errors=True), {"selector": RandomTail(TopK(k=8), k=6)}),
    "SampledAttend, collisions": (SampledAttend, {"selector": CollisionSample(20, 4), "encoder": SAMPLES}),
}


def exported(kind: type, *containers: str) -> set[str]:
    """Names of the parts of a kind that the library exports, but for those that hold one a layer."""
    found = {n for n in hashattn.__all__ if isinstance(x := getattr(hashattn, n), type) and issubclass(x, kind)}
    return found - {kind.__name__, *containers}


def covered(table: Mapping[str, object]) -> set[str]:
    """The classes in a table: what stands before the comma."""
    return {name.split(",")[0].split(" and ")[0] for name in table}
