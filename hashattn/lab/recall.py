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
from hashattn.lab.kept import as_mask, logits_of, recall, relative_mass, seen_from, top
from hashattn.ops.nearest import nearest


@torch.no_grad()
def recall_and_mass(
    encoder: Encoder,
    samples: Sequence[Sample],
    *,
    index: Index | None = None,
    budget: float = 0.05,
    k: int | None = None,
    queries: int = 64,
) -> tuple[float, float]:
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
    recalls, masses = (sum(values) / len(found) for values in zip(*found, strict=True))
    return recalls, masses


def _judge(
    encoder: Encoder, index: Index, sample: Sample, budget: float, k: int | None, queries: int
) -> tuple[float, float]:
    rows = spaced(sample.positions, sample.k.shape[1], queries)
    q, keys, positions = sample.q[:, rows].float(), sample.k.float(), sample.positions[rows]
    seen = seen_from(positions, keys.shape[1])
    counts = [min(p + 1, k if k is not None else math.ceil(budget * (p + 1))) for p in positions.tolist()]
    logits = logits_of(q, keys, seen, q.shape[-1] ** -0.5)
    store = index.new_store()
    centre = encoder.centre_of(keys.unsqueeze(0))
    store.add(encoder.encode_key(keys.unsqueeze(0), centre))
    query = encoder.encode_query(q.unsqueeze(0))
    distances = index.distances(store, query, biased=encoder.biased, host=keys.device.type == "cpu")[0]
    count = torch.tensor(counts, device=keys.device)
    wanted = torch.arange(max(counts), device=keys.device) < count.unsqueeze(-1)
    near = as_mask(nearest(distances, max(counts), seen).masked_fill(~wanted, -1), logits)
    best = top(logits, count.expand(len(q), -1))
    return recall(near, best), relative_mass(logits.softmax(-1), near, best)


def spaced(positions: Tensor, keys: int, queries: int) -> Tensor:
    """Which of some ascending positions to look at: `queries` of them, evenly spaced in the second half of the keys."""
    late = (positions >= keys // 2).nonzero().squeeze(-1)
    late = late if len(late) else torch.arange(len(positions), device=positions.device)
    place = torch.linspace(0, len(late) - 1, min(queries, len(late)), device=late.device)
    return late[place.round().long()]
