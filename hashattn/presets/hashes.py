"""Methods that compare codes of signs or buckets: learned hashes, random and fitted planes, hash tables."""

from __future__ import annotations

from hashattn.attend import ExactAttend, SampledAttend
from hashattn.attention import HashAttention
from hashattn.encoders import (
    ITQ,
    AsymmetricHash,
    Centring,
    CrossPolytope,
    SimHash,
    SimpleLSH,
    SpectralHash,
    SymmetricHash,
)
from hashattn.index import FlatBuckets, FlatHamming
from hashattn.selectors import CollisionSample, Recent, Sink, TopK


def hata(
    *,
    bits: int = 128,
    k: int = 512,
    heads: int | None = None,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """HATA, "Trainable and Hardware-Efficient Hash-Aware Top-k Attention" (arXiv 2506.02572).

    One learned linear hash for queries and keys, 128 bits; Hamming distances summed over a KV head's queries; top 512
    (short contexts) or 2048 (long ones) exactly; layers 0-1 dense. The paper trains a hash for each KV head, which
    heads=Hkv does, and does not centre keys; here they are centred, which finds more (docs/encoders.md has the figures,
    and the paper's loss).
    """
    return HashAttention(
        encoder=SymmetricHash(bits, heads=heads),
        index=FlatHamming(),
        selector=TopK(k=k, per="kv_head", combine="sum"),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def hashattention(
    *,
    bits: int = 32,
    k: int = 512,
    sinks: int = 128,
    recent: int = 128,
    heads: int | None = None,
    engine: str = "auto",
) -> HashAttention:
    """HashAttention, "Semantic Sparsity for Faster Inference" (arXiv 2412.14468).

    MLPs d-128-128-32 for queries and keys; 128 sinks and 128 recent keys beside the top-k. The paper trains a pair per
    query head: heads=Hq does so (codes are then kept per query head), None shares one pair. The authors' code has SiLU
    where this is a ReLU beside a linear skip, and does not centre keys.
    """
    return HashAttention(
        encoder=AsymmetricHash(bits, query_hidden=(128, 128), key_hidden=(128, 128), heads=heads),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | TopK(k=sinks + recent + k),
        attend=ExactAttend(),
        engine=engine,
    )


def spotlight(
    *,
    bits: int = 128,
    share: float = 0.02,
    hidden: int = 128,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """Spotlight Attention (arXiv 2508.19740): MLP hashes fitted by ranking (the default loss); the nearest 2% exactly.

    The authors' code for LLaMA has a residual MLP 128-128-128 with SiLU for each query head, shared by queries and
    keys, and ranks the true top 2% above others; here each side has one of its own, a ReLU beside a linear skip, for
    all heads, and the top 5% are ranked. Layers 0 and 1 are dense, as in its evaluations.
    """
    return HashAttention(
        encoder=AsymmetricHash(bits, query_hidden=(hidden,), key_hidden=(hidden,)),
        index=FlatHamming(),
        selector=TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def simhash_topk(
    *,
    bits: int = 128,
    query_bits: int = 1,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """Random hyperplanes on centred keys (Charikar, STOC 2002) and exact attention to the nearest keys; no training."""
    return HashAttention(
        encoder=SimHash(bits, query_bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def itq(
    *,
    bits: int = 128,
    query_bits: int = 4,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """Iterative quantisation (Gong & Lazebnik, CVPR 2011): principal axes, rotated to be near their signs.

    Queries are scored as multi-bit vectors, which the paper's symmetric codes are not: query_bits=1 is the original.
    """
    return HashAttention(
        encoder=ITQ(bits, query_bits=query_bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def spectral(
    *,
    bits: int = 128,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """Spectral hashing (Weiss, Torralba & Fergus, NIPS 2008): signs of sinusoids along principal axes.

    It is made for neighbours in space. Queries are no keys: they are scaled to the keys' size first, which is ours.
    """
    return HashAttention(
        encoder=SpectralHash(bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def alsh(
    *,
    bits: int = 128,
    query_bits: int = 1,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """Simple-LSH for true inner products (Neyshabur & Srebro, ICML 2015), after ALSH (Shrivastava & Li, NIPS 2014).

    Keys get one more coordinate, which makes their norms equal, and then random planes. Keys longer than the largest
    one that was fitted to count as that long. ``replace(encoder=L2ALSH(bits))`` is the older lift.
    """
    return HashAttention(
        encoder=SimpleLSH(bits, query_bits=query_bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def reformer(
    *,
    rounds: int = 16,
    buckets: int = 64,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """Reformer's hash (Kitaev et al., arXiv 2001.04451): the largest coordinate after a random rotation, in rounds.

    Keys are ranked by the rounds in which they share the query's bucket. The original attends within sorted chunks of
    equal buckets, and its queries are its keys, which a trained model's are not.
    """
    return HashAttention(
        encoder=CrossPolytope(rounds, buckets),
        index=FlatBuckets(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def magicpig(
    *,
    tables: int = 150,
    bits: int = 10,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 16),
    engine: str = "auto",
) -> HashAttention:
    """MagicPIG, "LSH Sampling for Efficient LLM Generation" (arXiv 2410.16179): L=150 tables of K=10 bits.

    Keys that collide with the query in two tables are sampled and weighed by the probability of that. How many is up to
    the data. Layers 0 and 16 are dense, each 16th as in the authors' code: a model of 16 layers or fewer wants
    dense_layers=(0,), one of more than 32 layers more of them. That code centres keys on the mean of the prompt and
    attends exactly to all that was generated; here it is the mean of the first keys, and the last 64.
    """
    sample = CollisionSample(tables, bits)
    return HashAttention(
        encoder=SimHash(sample.code_bits, orthogonal=False, centring=Centring(1.0)),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | sample,
        attend=SampledAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )
