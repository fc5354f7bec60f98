"""Methods that estimate inner products or bounds of them, and FAISS's indexes."""

from __future__ import annotations

from functools import reduce
from operator import or_

from hashattn.attend import ExactAttend
from hashattn.attention import HashAttention
from hashattn.encoders import PCA, PQ, HeavyChannels, Identity, RaBitQ, SimHash
from hashattn.index import Channels, FaissBinary, FlatDot, FlatPQ, FlatRaBitQ, Pages
from hashattn.selectors import Recent, Selector, Sink, TopK


def pqcache(
    *,
    subquantisers: int = 2,
    sub_bits: int = 6,
    share: float = 0.2,
    sinks: int = 32,
    recent: int = 32,
    dense_layers: tuple[int, ...] = (),
    engine: str = "auto",
) -> HashAttention:
    """PQCache (arXiv 2407.12820): product quantisation of the keys, inner products from lookup tables.

    The paper clusters at each prefill; here codebooks are fitted beforehand, and serve every text. A code takes a byte
    a sub-quantiser, whatever sub_bits. The authors' code gives half of the 20% to the most recent keys and lets a KV
    head choose by its queries' summed softmax; here the last 32 are forced, and each query head chooses.
    """
    return HashAttention(
        encoder=PQ(subquantisers, sub_bits=sub_bits),
        index=FlatPQ(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def quest(
    *,
    page: int = 16,
    share: float = 0.05,
    sinks: int = 0,
    recent: int = 0,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """Quest, "Query-Aware Sparsity" (arXiv 2406.10774): pages by the largest inner product they can hold.

    Pages of 16 keys, layers 0 and 1 dense. Budgets count keys here, so that the last page may be kept in part. The
    paper forces no keys: sinks=4, recent=64 keep more where a first key holds much of the attention. Its budgets are
    512 to 4096 keys; the share is ours.
    """
    return HashAttention(
        encoder=Identity(),
        index=Pages(page),
        selector=_forcing(TopK(share=share), sinks, recent),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def rabitq(
    *,
    bits: int = 0,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """RaBitQ (Gao & Long, SIGMOD 2024, arXiv 2405.12497): a rotation, a sign a dimension, an unbiased estimate.

    The centre is the row's frozen one instead of a cluster's, and queries take 15 bits and a sign a coordinate, where
    the paper rounds them to 4 bits. bits=0 is one a dimension.
    """
    return HashAttention(
        encoder=RaBitQ(bits),
        index=FlatRaBitQ(),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def loki(
    *, components: int = 32, share: float = 0.25, dense_layers: tuple[int, ...] = (), engine: str = "auto"
) -> HashAttention:
    """Loki, "Low-rank Keys for Efficient Sparse Attention" (arXiv 2406.02542): a quarter of the principal components.

    32 of head_dim 128, the best quarter of the keys. The components are stored beside the keys, where the paper stores
    rotated keys instead.
    """
    return HashAttention(
        encoder=PCA(components),
        index=FlatDot(),
        selector=TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def sparq(
    *, channels: int = 32, k: int = 128, recent: int = 32, dense_layers: tuple[int, ...] = (), engine: str = "auto"
) -> HashAttention:
    """SparQ Attention (arXiv 2312.04985): the query's largest channels alone score the keys; the top 128 exactly.

    The last 32 are among these. Without the paper's mean-value term; a group's products are summed as they are, where
    the authors' code first divides each by the root of what its channels hold of the query. Keys are multiplied in
    whole here: the selection is SparQ's, no bytes are saved.
    """
    return HashAttention(
        encoder=Identity(),
        index=Channels(channels),
        selector=Recent(recent) | TopK(k=k, per="kv_head"),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def double_sparsity(
    *, channels: int = 16, share: float = 1 / 16, dense_layers: tuple[int, ...] = (0, 1), engine: str = "auto"
) -> HashAttention:
    """Double Sparsity (arXiv 2408.07092): a few heavy channels, found beforehand and rounded to 4 bits, score the keys.

    A sixteenth of the keys, layers 0 and 1 dense. Labels and queries are rounded to 16 levels from the least to the
    largest, and labels are stored in the keys' dtype. A KV head chooses channels and keys by the sum of its queries'
    products; in the authors' code each query head does.
    """
    return HashAttention(
        encoder=HeavyChannels(channels),
        index=FlatDot(),
        selector=TopK(share=share, per="kv_head"),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def faiss_hnsw(
    *,
    bits: int = 128,
    links: int = 32,
    ef_search: int = 128,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """FAISS's graph over binary codes (Malkov & Yashunin, arXiv 1603.09320): SimHash codes in BHNSW32."""
    return HashAttention(
        encoder=SimHash(bits),
        index=FaissBinary(f"BHNSW{links}", ef_search=ef_search),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def faiss_ivf(
    *,
    bits: int = 128,
    cells: int = 64,
    nprobe: int = 8,
    share: float = 0.05,
    sinks: int = 4,
    recent: int = 64,
    dense_layers: tuple[int, ...] = (0, 1),
    engine: str = "auto",
) -> HashAttention:
    """FAISS's inverted file over binary codes: SimHash codes in BIVF64, of which 8 cells are searched."""
    return HashAttention(
        encoder=SimHash(bits),
        index=FaissBinary(f"BIVF{cells}", nprobe=nprobe),
        selector=Sink(sinks) | Recent(recent) | TopK(share=share),
        attend=ExactAttend(),
        engine=engine,
        dense_layers=dense_layers,
    )


def _forcing(ranked: Selector, sinks: int, recent: int) -> Selector:
    """The selector with forced keys, of which there may be none."""
    forced: list[Selector] = [part(keys) for part, keys in ((Sink, sinks), (Recent, recent)) if keys]
    return reduce(or_, [*forced, ranked])
