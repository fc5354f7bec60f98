"""What a composition keeps of one layer's attention: recall, mass, output error, on prefill keys and decoded keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.budget import Budget
from hashattn.core.types import Step
from hashattn.lab.kept import Truth, figures, kept_by, recall, relative_mass, top
from hashattn.selectors import Selector, TopK

AT = 100  # of recall@100
_KEYS, _KEPT = ("keys_read", "searched", "keys_ranked"), ("recall", "mass", "relative_mass", "output_error")
NAMES = (*_KEYS, *_KEPT, "ranked_recall", "ranked_mass", "recall_at_100", "recall_prefill", "recall_decoded")


def judge_layer(
    attn: HashAttention, truth: Truth, share: float, prefill: int, step: Step
) -> tuple[dict[str, float | None], Step]:
    """Figures of one layer and text, means over queries and query heads; and the step for the next layer.

    Those of :func:`hashattn.lab.kept.figures`, forced ones and the middle tier included, and
    searched, keys_ranked: share of the queries for which keys were ranked beyond the forced ones, and keys that a head
        kept beyond these there.
    ranked_recall, ranked_mass: recall and relative mass of the `share` nearest keys by the encoder's distances alone,
        without forced keys, tiers, discounts or a group's common choice; recall_at_100: recall of the 100 nearest.
    recall_prefill, recall_decoded: recall among the keys that are not forced, in the columns below `prefill` and in
        those from it on; their ratio is the drift.

    Args:
        attn: bound to the layer; its engine searches.
        truth: full attention of the same.
        share: the budget of ranked_recall and ranked_mass.
        prefill: columns below this are prefill keys.
        step: the layer's number and what the layer before kept.
    """
    cache = attn.new_cache(1, truth.k.shape[1], truth.k.shape[3])
    cache.append(truth.k, truth.v)
    wants = attn.selector is not None and attn.selector.needs_weights
    output, selection = attn.run(truth.q, cache, scale=truth.scale, step=step, need_weights=wants)
    kept = truth.seen.expand_as(truth.p) if selection is None else kept_by(selection, truth.p)
    found: dict[str, float | None] = dict.fromkeys(NAMES)
    found |= figures(kept, output.out[0], truth)
    found |= _ranked_keys(attn.selector, truth, kept, cache.warmup, selection is not None)
    found |= _by_age(attn.selector, truth, kept, prefill)
    found |= _ranked(attn, cache, truth, share)
    return found, Step(step.layer + 1, selection, output.weights if selection is not None else None)


def ratio(part: Tensor, whole: Tensor) -> float | None:
    """part / whole as a number; None where there is nothing."""
    return float(part / whole) if float(whole) else None


def mean(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each figure over the rows that have it."""
    found: dict[str, float | None] = {}
    for name in rows[0] if rows else ():
        values = [value for row in rows if (value := row[name]) is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def _ranked_keys(
    selector: Selector | None, truth: Truth, kept: Tensor, warmup: int, chosen: bool
) -> dict[str, float | None]:
    """Whether, and how many, keys were ranked beyond those that are kept for their position."""
    visible = truth.seen.sum(-1).tolist()
    if selector is None or not chosen:
        return {"searched": 0.0, "keys_ranked": 0.0}
    searched = torch.tensor([n >= warmup and selector.chooses_at(n) for n in visible], device=kept.device)
    forced = torch.tensor([min(n, selector.sinks + selector.recents) for n in visible], device=kept.device)
    beyond = (kept.sum(-1) - forced)[:, searched].double()  # [Hq, T']
    return {"searched": float(searched.double().mean()), "keys_ranked": float(beyond.mean()) if beyond.numel() else 0.0}


def _by_age(selector: Selector | None, truth: Truth, kept: Tensor, prefill: int) -> dict[str, float | None]:
    """Recall among keys that are not forced, of prefill keys and of decoded keys."""
    tokens, keys = truth.seen.shape
    columns = torch.arange(keys, device=kept.device)
    ends = torch.arange(keys - tokens + 1, keys + 1, device=kept.device)[:, None]
    sinks, recents = (0, 0) if selector is None else (selector.sinks, selector.recents)
    free = (columns >= sinks) & (columns < ends - recents)  # [T, N]
    chosen = kept & free
    exact = top(truth.p.masked_fill(~free, -1.0), chosen.sum(-1)) & free
    hit = chosen & exact
    return {
        "recall_prefill": ratio(hit[..., :prefill].sum(), exact[..., :prefill].sum()),
        "recall_decoded": ratio(hit[..., prefill:].sum(), exact[..., prefill:].sum()),
    }


def _ranked(attn: HashAttention, cache: KVCache, truth: Truth, share: float) -> dict[str, float | None]:
    """What the encoder's distances alone find."""
    if attn.encoder is None or not any(cache.ready):
        return {}
    query = attn.encoder.encode_query(truth.q)
    view = cache.view(query, truth.q.shape[1], cache.spans(truth.q.shape[2]))
    view.raw  # noqa: B018 (computed once, for both)
    nearest = kept_by(TopK(share=share).select(view, Step()), truth.p)
    hundred = kept_by(TopK(k=AT).select(view, Step()), truth.p)
    seen = truth.seen.sum(-1)[None]
    exact = top(truth.p, Budget(share=share).counts(seen).expand(len(truth.p), -1))
    best = top(truth.p, Budget(k=AT).counts(seen).expand(len(truth.p), -1))
    return {
        "ranked_recall": recall(nearest, exact),
        "ranked_mass": relative_mass(truth.p, nearest, exact),
        "recall_at_100": recall(hundred, best),
    }
