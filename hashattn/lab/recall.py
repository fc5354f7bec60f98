"""Recall and kept attention mass of an encoder on captured queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.core.naming import short
from hashattn.encoders.base import Encoder
from hashattn.encoders.sample import Sample
from hashattn.index import FlatHamming, Index
from hashattn.ops.nearest import nearest


@torch.no_grad()
def recall_and_mass(
    encoder: Encoder, samples: Sequence[Sample], *, index: Index | None = None, budget: float = 0.05,
    k: int | None = None, queries: int = 64,
) -> tuple[float, float]:  # fmt: skip
    """How well the nearest keys by code stand for those with the largest logits.

    Args:
        encoder: of the layer.
        samples: of one layer.
        index: that ranks the codes; FlatHamming() by default.
        budget: share of the keys that a query sees, rounded up.
        k: a number of keys instead.
        queries: of each sample, evenly spaced over those in the second half of its keys; over all of them where there
            are none.

    Returns:
        the share of the true best keys that is found, and the attention mass of what is found over the true best
        keys' mass; means over queries and heads, then over samples.

    Raises:
        ValueError: no samples, or codes that the index does not hold.
        TypeError: an index that only searches.
    """
    if not samples:
        raise ValueError("samples must hold at least one, got none")
    index = index or FlatHamming()
    if not index.accepts(encoder.code):
        raise ValueError(
            f"encoder must make codes that {short(index)} holds, got {short(encoder)}, which makes {encoder.code!r}"
        )
    found = [_judge(encoder, index, sample, budget, k, queries) for sample in samples]
    recall, mass = (sum(values) / len(found) for values in zip(*found, strict=True))
    return recall, mass


def _judge(
    encoder: Encoder, index: Index, sample: Sample, budget: float, k: int | None, queries: int
) -> tuple[float, float]:
    rows = spaced(sample.positions, sample.k.shape[1], queries)
    q, keys, positions = sample.q[:, rows].float(), sample.k.float(), sample.positions[rows]
    columns = torch.arange(keys.shape[1], device=keys.device)
    seen = columns <= positions.unsqueeze(-1)  # [T, N]
    counts = [min(p + 1, k if k is not None else math.ceil(budget * (p + 1))) for p in positions.tolist()]
    kept = torch.arange(max(counts), device=keys.device) < torch.tensor(counts, device=keys.device).unsqueeze(-1)
    logits = (q.reshape(len(keys), -1, q.shape[-1]) @ keys.transpose(-1, -2)).view(*q.shape[:2], -1)
    weights = (logits * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    store = index.new_store()
    store.add(encoder.encode_key(keys.unsqueeze(0), centre_of(encoder, keys)))
    query = encoder.encode_query(q.unsqueeze(0))
    distances = index.distances(store, query, biased=encoder.biased, host=keys.device.type == "cpu")[0]
    near = nearest(distances, max(counts), seen)
    best = logits.masked_fill(~seen, -torch.inf).topk(max(counts), dim=-1).indices
    hits = _marked(near, kept, weights) & _marked(best, kept, weights)
    recall = hits.sum(-1) / kept.sum(-1)
    mass = (weights.gather(-1, near.clamp(min=0).long()) * kept).sum(-1) / (weights.gather(-1, best) * kept).sum(-1)
    return recall.mean().item(), mass.mean().item()


def spaced(positions: Tensor, keys: int, queries: int) -> Tensor:
    """Which of some ascending positions to look at: `queries` of them, evenly spaced in the second half of the keys."""
    late = (positions >= keys // 2).nonzero().squeeze(-1)
    late = late if len(late) else torch.arange(len(positions), device=positions.device)
    place = torch.linspace(0, len(late) - 1, min(queries, len(late)), device=late.device)
    return late[place.round().long()]


def centre_of(encoder: Encoder, keys: Tensor) -> Tensor | None:
    """The centre that a cache would freeze for keys [Hkv, N, D]: [1, Hkv, D], None if the encoder wants none."""
    centring = encoder.centring
    if centring is None:
        return None
    return centring.strength * keys[:, centring.skip : centring.warmup].mean(1).unsqueeze(0)


def _marked(ids: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """bool, the shape of `like` [Hq, T, N]: True at the kept ids [Hq, T, K]."""
    keys = like.shape[-1]
    marks = torch.zeros(*like.shape[:-1], keys + 1, dtype=torch.bool, device=like.device)  # the last for empty slots
    columns = torch.where(kept & (ids >= 0), ids, keys).long()
    return marks.scatter_(-1, columns, True)[..., :keys]
