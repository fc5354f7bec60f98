"""Published methods as compositions: one short function each, with the paper and its hyperparameters.

Defaults are the published values; what a paper leaves to calibration is an argument. Where readings of a paper
disagree, the docstring gives both.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hashattn.attend import DenseAttend, ExactAttend, MixedPrecision
from hashattn.attention import HashAttention
from hashattn.encoders import AsymmetricHash, Identity, SimHash, SymmetricHash
from hashattn.encoders.base import Encoder
from hashattn.index import FlatDot, FlatHamming
from hashattn.pretrained import fitted
from hashattn.saving import Pretrained
from hashattn.selectors import Consensus, Momentum, Recent, Selector, Sink, Tiers, TopK

SANDWICH = (0, 1, -1)


def dashkv(
    *, bits: int = 128, t1: float = 0.05, t2: float = 0.10, sinks: int = 4, recent: int = 64, vote_share: float = 0.5,
    encoder: Encoder | None = None, dense_layers: tuple[int, ...] = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV, "Accelerating Long-Context LLM Inference via Asymmetric KV Cache Hashing" (arXiv 2604.19351).

    Query MLP d-256-256-bits, linear keys; consensus across heads, momentum across layers; three precision tiers;
    sinks and neighbours always critical; first and last layers dense. Readings give 32-64 or 128 bits, and layers 0-4
    and 27-32 of 32 as the dense ones; percentiles t1, t2 and the discounts are calibrated per model.
    """
    return HashAttention(
        encoder=encoder or AsymmetricHash(bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | Momentum(Consensus(Tiers(t1, t2), vote_share=vote_share)),
        attend=MixedPrecision(),
        engine=engine,
        dense_layers=dense_layers,
    )


def dashkv_hash_only(
    *, bits: int = 128, share: float = 0.05, sinks: int = 4, recent: int = 64,
    dense_layers: tuple[int, ...] = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV ablation: asymmetric hashing alone, exact attention to the nearest keys (arXiv 2604.19351)."""
    return _ablation(TopK(share=share), bits, sinks, recent, dense_layers, engine)


def dashkv_consensus(
    *, bits: int = 128, share: float = 0.05, sinks: int = 4, recent: int = 64, vote_share: float = 0.5,
    dense_layers: tuple[int, ...] = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV ablation: hashing and cross-head consensus (arXiv 2604.19351)."""
    ranked = Consensus(TopK(share=share), vote_share=vote_share)
    return _ablation(ranked, bits, sinks, recent, dense_layers, engine)


def dashkv_momentum(
    *, bits: int = 128, share: float = 0.05, sinks: int = 4, recent: int = 64, vote_share: float = 0.5,
    dense_layers: tuple[int, ...] = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV ablation: hashing, consensus and cross-layer momentum (arXiv 2604.19351)."""
    ranked = Momentum(Consensus(TopK(share=share), vote_share=vote_share))
    return _ablation(ranked, bits, sinks, recent, dense_layers, engine)


def dashkv_symmetric(
    *, bits: int = 128, t1: float = 0.05, t2: float = 0.10, sinks: int = 4, recent: int = 64, vote_share: float = 0.5,
    dense_layers: tuple[int, ...] = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV ablation: everything, with one encoder for queries and keys (arXiv 2604.19351)."""
    return dashkv(
        t1=t1, t2=t2, sinks=sinks, recent=recent, vote_share=vote_share, encoder=SymmetricHash(bits),
        dense_layers=dense_layers, engine=engine,
    )  # fmt: skip


def dashkv_fast(
    *, bits: int = 128, query_bits: int = 2, share: float = 0.05, sinks: int = 4, recent: int = 64,
    per: str = "query_head", combine: str = "sum", encoder: Encoder | None = None,
    dense_layers: tuple[int, ...] = (0, 1), engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """What we would ship of DASH-KV (after arXiv 2604.19351): its asymmetric hashes, exact attention to what they find.

    On real models (docs/results.md) consensus and momentum gain little and the middle tier loses, so that none of them
    is here. The query's map is linear, and a query of 2 bit planes finds more at the same bytes a key. Each query head
    chooses for itself, as published: per="kv_head" reads fewer keys and is faster still, but loses what only one
    head of a group looks for.
    """
    return HashAttention(
        encoder=encoder or AsymmetricHash(bits, query_hidden=(), query_bits=query_bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share, per=per, combine=combine),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def hata(
    *, bits: int = 128, k: int = 512, dense_layers: tuple[int, ...] = (0, 1), engine: str = "auto"
) -> HashAttention:
    """HATA, "Trainable and Hardware-Efficient Hash-Aware Top-k Attention" (arXiv 2506.02572).

    One learned linear hash for queries and keys, 128 bits; Hamming distances summed over a KV head's queries; top 512
    (short contexts) or 2048 (long ones) exactly; layers 0-1 dense.
    """
    return HashAttention(
        encoder=SymmetricHash(bits),
        index=FlatHamming(),
        selector=TopK(k=k, per="kv_head", combine="sum"),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def hashattention(
    *, bits: int = 32, k: int = 512, sinks: int = 128, recent: int = 128, heads: int | None = None,
    engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """HashAttention, "Semantic Sparsity for Faster Inference" (arXiv 2412.14468).

    MLPs d-128-128-32 for queries and keys; 128 sinks and 128 recent keys beside the top-k. The paper trains a pair per
    query head: heads=Hq does so (codes are then kept per query head), None shares one pair.
    """
    return HashAttention(
        encoder=AsymmetricHash(bits, query_hidden=(128, 128), key_hidden=(128, 128), heads=heads),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | TopK(k=sinks + recent + k),
        attend=ExactAttend(),
        engine=engine,
    )


def simhash_topk(
    *, bits: int = 128, query_bits: int = 1, share: float = 0.05, sinks: int = 4, recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1), engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """Random hyperplanes on centred keys (Charikar, STOC 2002) and exact attention to the nearest keys; no training."""
    return HashAttention(
        encoder=SimHash(bits, query_bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def streaming(*, sinks: int = 4, recent: int = 1020, engine: str = "auto") -> HashAttention:
    """StreamingLLM, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).

    4 sinks and a window; the paper's sizes run from 4+252 to 4+4092. Positions stay those of the text.
    """
    return HashAttention(selector=Sink(sinks) | Recent(recent), attend=ExactAttend(), engine=engine)


def oracle_topk(
    *, share: float = 0.05, sinks: int = 4, recent: int = 64, dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """The oracle: exact inner products rank the keys. What every encoder is measured against; it saves no reading."""
    return HashAttention(
        encoder=Identity(),
        index=FlatDot(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def full() -> HashAttention:
    """Full attention (Vaswani et al., arXiv 1706.03762): the baseline."""
    return HashAttention(attend=DenseAttend())


PRESETS: dict[str, Callable[..., HashAttention]] = {
    preset.__name__: preset
    for preset in (
        dashkv, dashkv_hash_only, dashkv_consensus, dashkv_momentum, dashkv_symmetric, dashkv_fast, hata, hashattention,
        simhash_topk, streaming, oracle_topk, full,
    )
}  # fmt: skip


def build(name: str, *, pretrained: str | Path | Pretrained | None = None, **options: Any) -> HashAttention:
    """The preset of this name, with fitted encoders if asked for; see :meth:`HashAttention.from_preset`."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; the presets are {', '.join(PRESETS)}")
    known = options_of(name)
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise TypeError(
                f"preset {name!r} takes no option {option!r}{_nearest(option, (*known, 'pretrained'))}; {takes}"
            )
    attn = PRESETS[name](**options)
    return attn if pretrained is None else fitted(name, attn, pretrained, options)


def options_of(name: str) -> dict[str, Any]:
    """The options of a preset and their defaults (the published hyperparameters)."""
    return {p.name: p.default for p in inspect.signature(PRESETS[name]).parameters.values()}


def budget_options(
    name: str, budget: float | None, tokens: int, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The options that give a preset this share of `tokens` keys, forced ones included; none for None.

    Args:
        name: of the preset.
        budget: above 0 and at most 1.
        tokens: keys, for presets that count them.
        given: options that the preset will get as well.

    Raises:
        ValueError: an unknown preset, a budget out of (0, 1], or a preset without one.
    """
    build(name)
    if budget is None:
        return {}
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be a share above 0 and at most 1, got {budget}")
    options = {**options_of(name), **(given or {})}
    if "t2" in options:
        return {"t1": budget / 2, "t2": budget}
    if "share" in options:
        return {"share": budget}
    keys = math.ceil(budget * tokens)
    if "k" in options:  # beside the forced keys
        return {"k": max(1, keys - options.get("sinks", 0) - options.get("recent", 0))}
    if "recent" in options:
        return {"recent": max(1, keys - options["sinks"])}
    raise ValueError(f"preset {name!r} has no budget: it reads every key")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _ablation(
    ranked: Selector, bits: int, sinks: int, recent: int, dense_layers: tuple[int, ...], engine: str
) -> HashAttention:
    return HashAttention(
        encoder=AsymmetricHash(bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | ranked,
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )
