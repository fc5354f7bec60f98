"""Methods that say how many keys, or which, by other means than codes; and the baselines."""

from __future__ import annotations

from hashattn.attend import DenseAttend, ExactAttend, SampledAttend
from hashattn.attention import HashAttention
from hashattn.encoders import Identity, SimHash
from hashattn.index import FlatDot, FlatHamming, Pages
from hashattn.selectors import HeavyHitters, ObservationWindow, RandomTail, Recent, Sink, TopK, TopP


def streaming(*, sinks: int = 4, recent: int = 1020, engine: str = "auto") -> HashAttention:
    """StreamingLLM, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).

    4 sinks and a window; the paper's sizes run from 4+252 to 4+4092. The window slides with every token, as the paper's
    rolling cache does. Positions stay those of the text, where the paper counts them within the cache.
    """
    return HashAttention(selector=Sink(sinks) | Recent(recent), attend=ExactAttend(), engine=engine)


def h2o(*, share: float = 0.2, engine: str = "auto") -> HashAttention:
    """H2O, "Heavy-Hitter Oracle" (arXiv 2306.14048): accumulated attention, and half of the budget the most recent.

    Selection is restricted and keys are kept: the outputs are those of eviction, and no memory is saved. The original
    fixes the budget at a share of the prompt and rounds it down; here it grows with the text and is rounded up. Weights
    are summed over a KV head, where each query head of the original chooses.
    """
    return HashAttention(selector=HeavyHitters(share=share), attend=ExactAttend(), engine=engine)


def snapkv(*, k: int = 1024, window: int = 64, pool: int = 5, engine: str = "auto") -> HashAttention:
    """SnapKV, "LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469): the last queries vote.

    Selection is restricted and keys are kept: the outputs are those of eviction, and no memory is saved. 64 queries and
    means of 5 neighbours are the defaults of the authors' class; their LongBench runs take 32, the maximum of 7, and
    4096 keys. Weights are summed over a KV head, where each query head of the original chooses.
    """
    return HashAttention(selector=ObservationWindow(k=k, window=window, pool=pool), attend=ExactAttend(), engine=engine)


def pyramidkv(
    *, layers: int = 32, share: float = 0.05, window: int = 64, pool: int = 5, engine: str = "auto"
) -> HashAttention:
    """PyramidKV (arXiv 2406.02069): SnapKV with more keys in low layers than in high ones, `share` on average.

    layers is the model's number. Each layer keeps its window, and what the share has beside the windows falls evenly
    over the layers, to a twentieth of its mean in the last. Keys are kept, as in snapkv. The authors count keys, which
    replace(selector=ObservationWindow(k=, layers=)) does; their LongBench runs take 8 queries and the maximum of 7.
    """
    return HashAttention(
        selector=ObservationWindow(share=share, window=window, pool=pool, layers=layers),
        attend=ExactAttend(),
        engine=engine,
    )


def twilight(
    *,
    p: float = 0.85,
    page: int = 16,
    share: float = 0.25,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """Twilight (arXiv 2502.02770) over Quest: of a quarter of the keys, the fewest that hold 85% of their attention.

    The candidates' logits are exact; the paper's come from a 4-bit copy of the keys.
    """
    return HashAttention(
        encoder=Identity(),
        index=Pages(page),
        selector=TopP(TopK(share=share), p=p),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def vattention(
    *,
    bits: int = 128,
    query_bits: int = 4,
    share: float = 0.05,
    tail: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """vAttention, "Verified Sparse Attention" (arXiv 2510.05688): top keys, and a sample that stands for the rest.

    The top keys come from SimHash here; the paper takes any base. The size of the sample is given, where the paper
    sizes it for an error (epsilon, delta) by a pilot sample, 0.05 each in the authors' code; SampledAttend(errors=True)
    tells the standard error. That code has 128 sinks and 128 recent keys beside the top 5%; here 4 and 64 are among it.
    """
    return HashAttention(
        encoder=SimHash(bits, query_bits),
        index=FlatHamming(),
        selector=Sink(sinks) | Recent(recent) | RandomTail(TopK(share=share), share=tail),
        attend=SampledAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def oracle_topk(
    *,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
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
