"""What a composition keeps of one layer's attention: recall, mass, output error, on prefill keys and decoded keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.attend.dense import dense
from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.budget import Budget
from hashattn.core.types import Selection, Step
from hashattn.selectors import Selector, TopK

AT = 100  # of recall@100
NAMES = (
    "keys_read", "searched", "keys_ranked", "recall", "mass", "relative_mass", "output_error", "ranked_recall",
    "ranked_mass", "recall_at_100", "recall_prefill", "recall_decoded",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Truth:
    """Full attention of the last T of N positions: p float32 [Hq, T, N], zero where a query does not see; out."""

    p: Tensor
    out: Tensor
    seen: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Truth:
        """For q [1, Hq, T, D], k and v [1, Hkv, N, D]."""
        tokens, keys = q.shape[2], k.shape[2]
        columns = torch.arange(keys, device=q.device)
        seen = columns <= torch.arange(keys - tokens, keys, device=q.device)[:, None]  # [T, N]
        grouped = q[0].float().unflatten(0, (k.shape[1], -1))  # [Hkv, G, T, D]
        logits = torch.einsum("hgtd,hnd->hgtn", grouped, k[0].float()).flatten(0, 1) * scale
        p = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return cls(p, dense(q, k, v, seen[None, None], scale).out.float(), seen)


def judge_layer(
    attn: HashAttention, q: Tensor, k: Tensor, v: Tensor, *, truth: Truth, scale: float, share: float, prefill: int,
    step: Step,
) -> tuple[dict[str, float | None], Step]:  # fmt: skip
    """Figures of one layer and text, means over queries and query heads; and the step for the next layer.

    keys_read: share of the visible keys that are kept, forced ones and the middle tier included.
    searched, keys_ranked: share of the queries for which keys were ranked beyond the forced ones, and keys that a head
        kept beyond these there.
    recall: of as many exact top keys, the share that is kept (recall@k, k what the query keeps).
    mass, relative_mass: attention mass of the kept keys, as a share of all and of the exact top keys'.
    output_error: |out - full attention's| / |full attention's|, 2-norms over all queries and heads.
    ranked_recall, ranked_mass: recall and relative mass of the `share` nearest keys by the encoder's distances alone,
        without forced keys, tiers, discounts or a group's common choice; recall_at_100: recall of the 100 nearest.
    recall_prefill, recall_decoded: recall among the keys that are not forced, in the columns below `prefill` and in
        those from it on; their ratio is the drift.

    Args:
        attn: bound to the layer; its engine searches.
        q, k, v: [1, Hq, T, D] of the last T positions; [1, Hkv, N, D].
        truth: full attention of the same.
        scale: of the logits.
        share: the budget of ranked_recall and ranked_mass.
        prefill: columns below this are prefill keys.
        step: the layer's number and what the layer before kept.
    """
    cache = attn.new_cache(1, k.shape[1], k.shape[3])
    cache.append(k, v)
    wants = attn.selector is not None and attn.selector.needs_weights
    output, selection = attn.run(q, cache, scale=scale, step=step, need_weights=wants)
    kept = truth.seen.expand_as(truth.p) if selection is None else as_mask(selection, truth.p)
    count = kept.sum(-1)
    exact = top(truth.p, count)
    figures: dict[str, float | None] = dict.fromkeys(NAMES)
    figures["keys_read"] = ratio(count.sum(), truth.seen.sum() * len(truth.p))
    figures["recall"] = float(((kept & exact).sum(-1) / count).mean())
    figures["mass"] = min(1.0, float((truth.p * kept).sum(-1).mean()))
    figures["relative_mass"] = relative_mass(truth.p, kept, exact)
    error = output.out.float() - truth.out
    figures["output_error"] = float(error.norm() / truth.out.norm())
    figures |= _ranked_keys(attn.selector, truth, kept, cache.warmup, selection is not None)
    figures |= _by_age(attn.selector, truth, kept, prefill)
    figures |= _ranked(attn, q, cache, truth, share)
    return figures, Step(step.layer + 1, selection, output.weights if selection is not None else None)


def as_mask(selection: Selection, like: Tensor) -> Tensor:
    """Which keys each query head keeps: bool [Hq, T, N] as `like`."""
    ids = selection.ids[0]  # [Hq or Hkv, T, K]
    ids = ids.repeat_interleave(like.shape[0] // ids.shape[0], 0).long()
    mask = torch.zeros(*like.shape[:2], like.shape[2] + 1, dtype=torch.bool, device=like.device)
    return mask.scatter_(-1, ids.masked_fill(ids < 0, like.shape[2]), True)[..., :-1]


def top(scores: Tensor, count: Tensor) -> Tensor:
    """The `count` [Hq, T] largest of scores [Hq, T, N], as a mask."""
    most = int(count.max())
    ids = scores.topk(most, -1).indices
    wanted = torch.arange(most, device=scores.device) < count[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ids, wanted)


def relative_mass(p: Tensor, kept: Tensor, exact: Tensor) -> float:
    """Mass of the kept keys over mass of as many exact top keys, mean over queries."""
    return min(1.0, float(((p * kept).sum(-1) / (p * exact).sum(-1)).mean()))


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
) -> dict[str, float | None]:  # fmt: skip
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


def _ranked(
    attn: HashAttention, q: Tensor, cache: KVCache, truth: Truth, share: float
) -> dict[str, float | None]:  # fmt: skip
    """What the encoder's distances alone find."""
    if attn.encoder is None or not any(cache.ready):
        return {}
    query = attn.encoder.encode_query(q)
    view = cache.view(query, q.shape[1], cache.spans(q.shape[2]))
    view.raw  # noqa: B018 (computed once, for both)
    nearest = as_mask(TopK(share=share).select(view, Step()), truth.p)
    hundred = as_mask(TopK(k=AT).select(view, Step()), truth.p)
    seen = truth.seen.sum(-1)[None]
    exact = top(truth.p, Budget(share=share).counts(seen).expand(len(truth.p), -1))
    best = top(truth.p, Budget(k=AT).counts(seen).expand(len(truth.p), -1))
    return {
        "ranked_recall": float(((nearest & exact).sum(-1) / exact.sum(-1)).mean()),
        "ranked_mass": relative_mass(truth.p, nearest, exact),
        "recall_at_100": float(((hundred & best).sum(-1) / best.sum(-1)).mean()),
    }
