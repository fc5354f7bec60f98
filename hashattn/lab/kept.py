"""What a choice of keys keeps of full attention: recall, mass, the output's error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.core.types import Selection


@dataclass(frozen=True, eq=False)
class Truth:
    """Full attention of the last T of N positions, in float64.

    Attributes:
        q, k, v: [1, Hq, T, D], [1, Hkv, N, D], as they were given.
        scale: of the logits.
        seen: bool [T, N], what a query sees.
        p: [Hq, T, N], zero where a query does not see.
        out: [Hq, T, D].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    seen: Tensor
    p: Tensor
    out: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Truth:
        """For q [1, Hq, T, D], k and v [1, Hkv, N, D]."""
        tokens, keys = q.shape[2], k.shape[2]
        seen = seen_from(torch.arange(keys - tokens, keys, device=q.device), keys)
        p = logits_of(q[0].double(), k[0].double(), seen, scale).softmax(-1)
        out = (p.view(k.shape[1], -1, keys) @ v[0].double()).view(*q.shape[1:3], -1)
        return cls(q, k, v, scale, seen, p, out)


def seen_from(positions: Tensor, keys: int) -> Tensor:
    """bool [T, N]: the keys up to each position [T]."""
    return torch.arange(keys, device=positions.device) <= positions.unsqueeze(-1)


def logits_of(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[Hq, T, N] of q [Hq, T, D] and k [Hkv, N, D], whose heads share keys; -inf where not seen [T, N]."""
    grouped = q.reshape(len(k), -1, q.shape[-1])
    products = (grouped @ k.transpose(-1, -2)).view(*q.shape[:2], -1)
    return (products * scale).masked_fill(~seen, -torch.inf)


def as_mask(ids: Tensor, like: Tensor) -> Tensor:
    """Which keys each query head keeps: bool [Hq, T, N] as `like`, of ids [Hq or Hkv, T, K], -1 for none."""
    ids = ids.repeat_interleave(like.shape[0] // ids.shape[0], 0).long()
    mask = torch.zeros(*like.shape[:2], like.shape[2] + 1, dtype=torch.bool, device=like.device)
    return mask.scatter_(-1, ids.masked_fill(ids < 0, like.shape[2]), True)[..., :-1]


def kept_by(selection: Selection, like: Tensor) -> Tensor:
    """The mask of a selection of one sequence."""
    return as_mask(selection.ids[0], like)


def top(scores: Tensor, count: Tensor) -> Tensor:
    """The `count` [Hq, T] largest of scores [Hq, T, N], as a mask."""
    most = int(count.max())
    ids = scores.topk(most, -1).indices
    wanted = torch.arange(most, device=scores.device) < count[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ids, wanted)


def recall(kept: Tensor, exact: Tensor) -> float:
    """The share of as many exact top keys that is kept, mean over queries."""
    return float(((kept & exact).sum(-1) / kept.sum(-1).clamp(min=1)).double().mean())


def relative_mass(p: Tensor, kept: Tensor, exact: Tensor) -> float:
    """Mass of the kept keys over mass of as many exact top keys, mean over queries."""
    return min(1.0, float(((p * kept).sum(-1) / (p * exact).sum(-1)).mean()))


def figures(kept: Tensor, out: Tensor, truth: Truth) -> dict[str, float]:
    """Means over queries and query heads, of kept keys [Hq, T, N] and the output [Hq, T, D].

    keys_read: share of the visible keys that are kept, by any way: forced, ranked or drawn.
    recall: of as many exact top keys, the share that is kept (recall@k, k what the query keeps).
    mass, relative_mass: attention mass of the kept keys, as a share of all and of the exact top keys'.
    output_error: |out - full attention's| / |full attention's|, 2-norms over all queries and heads.
    """
    count = kept.sum(-1)
    exact = top(truth.p, count)
    return {
        "keys_read": float(count.sum() / (truth.seen.sum() * len(kept))),
        "recall": recall(kept, exact),
        "mass": min(1.0, float((truth.p * kept).sum(-1).mean())),
        "relative_mass": relative_mass(truth.p, kept, exact),
        "output_error": float((out.double() - truth.out).norm() / truth.out.norm()),
    }
