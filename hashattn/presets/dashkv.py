"""DASH-KV, its ablations, and what we would ship of it."""

from __future__ import annotations

from hashattn.attend import ExactAttend, MixedPrecision
from hashattn.attention import HashAttention
from hashattn.encoders import AsymmetricHash, Encoder, SymmetricHash
from hashattn.index import FlatHamming
from hashattn.selectors import Consensus, Momentum, Recent, Selector, Sink, Tiers, TopK

SANDWICH = (0, 1, -1)


def sandwich(dense: tuple[int, ...] | int) -> tuple[int, ...]:
    """Numbers of dense layers: those given, or for a number n the first n layers and the last n.

    Raises:
        ValueError: n below 1.
    """
    if isinstance(dense, tuple):
        return dense
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 1:
        raise ValueError(
            "dense_layers must be a tuple of layer numbers, or an int of at least 1 for as many first and last layers, "
            f"got {dense!r}"
        )
    return *range(dense), *range(-dense, 0)


def dashkv(
    *, bits: int = 128, t1: float = 0.05, t2: float = 0.10, sinks: int = 4, recent: int = 64, vote_share: float = 0.5,
    encoder: Encoder | None = None, dense_layers: tuple[int, ...] | int = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV, "Accelerating Long-Context LLM Inference via Asymmetric KV Cache Hashing" (arXiv 2604.19351).

    Query MLP d-256-256-bits, linear keys; consensus across heads, momentum across layers; three precision tiers;
    sinks and neighbours always critical; first and last layers dense. Readings give 32-64 or 128 bits. One has the
    first and last five of 32 layers dense (0-4, 27-31): dense_layers=5, and as large a share of another model's, such
    as 3 of 18. Percentiles t1, t2 and the discounts are calibrated per model.
    """
    return HashAttention(
        encoder=encoder or AsymmetricHash(bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | Momentum(Consensus(Tiers(t1, t2), vote_share=vote_share)),
        attend=MixedPrecision(),
        engine=engine,
        dense_layers=sandwich(dense_layers),
    )


def dashkv_hash_only(
    *, bits: int = 128, share: float = 0.05, sinks: int = 4, recent: int = 64,
    dense_layers: tuple[int, ...] | int = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV ablation: asymmetric hashing alone, exact attention to the nearest keys (arXiv 2604.19351)."""
    return _ablation(TopK(share=share), bits, sinks, recent, dense_layers, engine)


def dashkv_consensus(
    *, bits: int = 128, share: float = 0.05, sinks: int = 4, recent: int = 64, vote_share: float = 0.5,
    dense_layers: tuple[int, ...] | int = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV ablation: hashing and cross-head consensus (arXiv 2604.19351)."""
    ranked = Consensus(TopK(share=share), vote_share=vote_share)
    return _ablation(ranked, bits, sinks, recent, dense_layers, engine)


def dashkv_momentum(
    *, bits: int = 128, share: float = 0.05, sinks: int = 4, recent: int = 64, vote_share: float = 0.5,
    dense_layers: tuple[int, ...] | int = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV ablation: hashing, consensus and cross-layer momentum (arXiv 2604.19351)."""
    ranked = Momentum(Consensus(TopK(share=share), vote_share=vote_share))
    return _ablation(ranked, bits, sinks, recent, dense_layers, engine)


def dashkv_symmetric(
    *, bits: int = 128, t1: float = 0.05, t2: float = 0.10, sinks: int = 4, recent: int = 64, vote_share: float = 0.5,
    dense_layers: tuple[int, ...] | int = SANDWICH, engine: str = "auto",
) -> HashAttention:  # fmt: skip
    """DASH-KV ablation: everything, with one encoder for queries and keys (arXiv 2604.19351)."""
    return dashkv(
        t1=t1, t2=t2, sinks=sinks, recent=recent, vote_share=vote_share, encoder=SymmetricHash(bits),
        dense_layers=dense_layers, engine=engine,
    )  # fmt: skip


def dashkv_fast(
    *, bits: int = 128, query_bits: int = 2, share: float = 0.05, sinks: int = 4, recent: int = 64,
    per: str = "query_head", combine: str = "sum", encoder: Encoder | None = None,
    dense_layers: tuple[int, ...] | int = (0, 1), engine: str = "auto",
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
        dense_layers=sandwich(dense_layers),
    )


def _ablation(
    ranked: Selector, bits: int, sinks: int, recent: int, dense_layers: tuple[int, ...] | int, engine: str
) -> HashAttention:
    return HashAttention(
        encoder=AsymmetricHash(bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | ranked,
        attend=ExactAttend(),
        engine=engine,
        dense_layers=sandwich(dense_layers),
    )
