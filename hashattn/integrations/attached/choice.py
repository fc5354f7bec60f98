"""What attached layers ask of the choice of engines: which one serves a call, a graph's steps, a kind of layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.engines.base import Request
from hashattn.engines.choose import choose
from hashattn.engines.parts import Parts


@dataclass(frozen=True)
class GraphChoice:
    """What serves the steps of a graph, which asks nothing.

    Attributes:
        parts: of the composition.
        searches: whether they search; otherwise they attend densely.
        why: for the report.
        turns: visible keys from which steps that attend densely would search; None if at no length.
    """

    parts: Parts
    searches: bool
    why: str
    turns: int | None = None


def why_never(attn: HashAttention) -> str | None:
    """Why no call of this composition searches; None if some may."""
    return None if attn.searches else "engine is dense"


def why_dense(attn: HashAttention, query: Tensor, kv: KVCache) -> str | None:
    """Why these queries attend densely to this cache; None if they search."""
    return attn.choice(query, kv).why_dense(kv.longest)


def serving(attn: HashAttention, query: Tensor, kv: KVCache) -> tuple[str, str]:
    """(engine, why) of a search of these queries, for the report."""
    return attn.choice(query, kv).why(attn.parts)


def for_graphs(
    attn: HashAttention, never: str | None, query: Tensor, kv: KVCache, ahead: int = 0
) -> GraphChoice | None:
    """What serves graphs of steps of such queries; None where that takes a host.

    Args:
        never: why the layer never searches; None if it does.
        ahead: keys that the first step adds.
    """
    choice = attn.choice(query, kv, captured=True)
    reason = never or choice.why_dense(kv.longest + ahead)
    if reason is not None:
        turns = choice.least if never is None and choice.engine.searches else None
        return GraphChoice(attn.parts, False, reason, turns)
    return GraphChoice(attn.parts, True, choice.why(attn.parts)[1]) if choice.engine.captures else None


def check_engine(attn: HashAttention, device: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """Raise ValueError if the engine that the composition names cannot serve layers of such models.

    Args:
        heads: (q_heads, kv_heads, head_dim).
    """
    choose(attn.parts, Request(torch.device(device), dtype, 1, *heads), attn.engine)
