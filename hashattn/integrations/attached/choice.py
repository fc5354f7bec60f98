"""Which engine serves a composition's calls, and why none of them searches: all that is asked about engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.engines import gpu
from hashattn.engines.choose import resolve
from hashattn.engines.decoder import Decoder

DENSE = "dense"
BY_CHOICE, BY_AUTO = "engine is dense", "auto: dense is faster"


@dataclass(frozen=True)
class GraphChoice:
    """What serves the steps of a graph, which asks nothing: a composition that a Decoder takes.

    Attributes:
        dense: whether they attend densely.
        why: for the report.
    """

    attn: HashAttention
    dense: bool
    why: str


def why_never(attn: HashAttention) -> str | None:
    """Why no call of this composition searches; None if some may."""
    return BY_CHOICE if attn.engine == DENSE else None


def why_dense(attn: HashAttention, query: Tensor, kv: KVCache) -> str | None:
    """Why these queries attend densely to this cache; None if they search."""
    if attn.engine_for(query, kv) != DENSE:
        return None
    return BY_AUTO if attn.engine == "auto" else BY_CHOICE


def serving(attn: HashAttention, query: Tensor, kv: KVCache) -> tuple[str, str]:
    """(engine, why) of a search of these queries, for the report."""
    engine = attn.engine_for(query, kv)
    if engine == "cpu" and attn.encoder is not None and attn.encoder.code != "binary":
        return "reference", f'engine="{attn.engine}", but "cpu" scans binary codes only'
    return engine, _why(attn, engine, kv)


def always_searching(attn: HashAttention, device: torch.device) -> HashAttention:
    """The composition with an engine that searches: "auto" may run dense, and one step's speed is not the point."""
    if attn.engine != "auto":
        return attn
    return attn.replace(engine="cpu" if device.type == "cpu" else "reference")


def for_graphs(attn: HashAttention, never: str | None, query: Tensor, kv: KVCache) -> GraphChoice | None:
    """What serves graphs of steps of such queries; None where that takes a host.

    Args:
        never: why the layer never searches; None if it does.
    """
    reason = never or why_dense(attn, query, kv)
    if reason is not None:
        return GraphChoice(attn.replace(engine=DENSE), True, reason)
    engine = attn.engine_for(query, kv)
    return GraphChoice(attn, False, _why(attn, engine, kv)) if engine == "triton" else None


def graph_engine(decoder: Decoder) -> str:
    """What serves a decoder's steps, for the report."""
    return DENSE if decoder.dense else "triton"


def check_engine(attn: HashAttention, device: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """Raise ValueError if the engine that the composition names cannot serve layers of such models.

    Args:
        heads: (q_heads, kv_heads, head_dim).
    """
    q_heads, kv_heads, head_dim = heads
    reason = gpu.why_not(attn, device=device, dtype=dtype, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    resolve(attn, device, 0, None, reason)


def _why(attn: HashAttention, engine: str, kv: KVCache) -> str:
    return f"auto, faster from {kv.crossover} keys on" if attn.engine == "auto" else f'engine="{engine}"'
