"""Losses of learned hashes: named terms, combined as in "kl + 0.1 * balance + 0.1 * quantisation"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Some queries of a sequence, some of its keys, and what the hash makes of them.

    Attributes:
        teacher: true logits, float32 [Hq, T, N].
        student: logits of the codes, with their learned scale, [Hq, T, N].
        seen: bool [T, N]; the keys that a query sees are the first ones of its row.
        v_q, v_k: projections before the sign, [Hq, T, bits] and [heads, N, bits].
        h_q, h_k: relaxed codes in -1 .. 1, of these shapes.
        temperature: of the teacher's softmax.
        generator: for what is drawn.
        unit: what v_k was multiplied with.
        planes: weights of the keys' linear map, [heads, D, bits], for terms of weights alone; None if there is none.
    """

    teacher: Tensor
    student: Tensor
    seen: Tensor
    v_q: Tensor
    v_k: Tensor
    h_q: Tensor
    h_k: Tensor
    temperature: float
    generator: torch.Generator
    unit: float = 1.0
    planes: Tensor | None = None

    def visible(self) -> Tensor:
        """Keys that each query sees, at least 1: int64 [T, 1]."""
        return self.seen.sum(-1, keepdim=True).clamp(min=1)

    def best(self, share: float) -> tuple[Tensor, Tensor]:
        """The true best keys, nearest first, int64 [Hq, T, K], and how many of them are within the share, [T, 1]."""
        count = (self.visible() * share).long().clamp(min=1)
        hidden = self.teacher.masked_fill(~self.seen, -torch.inf)
        return hidden.topk(max(1, int(count.max())), dim=-1).indices, count


def kl(batch: Batch) -> Tensor:
    """Listwise KL(teacher || student) over the keys of each query (DASH-KV, arXiv 2604.19351)."""
    log_student = F.log_softmax(batch.student.masked_fill(~batch.seen, -torch.inf), -1).masked_fill(~batch.seen, 0.0)
    log_teacher = F.log_softmax((batch.teacher / batch.temperature).masked_fill(~batch.seen, -torch.inf), -1)
    return (log_teacher.exp() * (log_teacher.masked_fill(~batch.seen, 0.0) - log_student)).sum(-1).mean()


def ranking(
    batch: Batch, *, positives: int = 32, negatives: int = 96, share: float = 0.05, near: float = 0.2
) -> Tensor:
    """Bradley-Terry: keys of the true top 5% should score above others; over pairs that the teacher orders.

    Half of the others are drawn from the rest of the true top 20%, where the cut of a search lies, half from all keys.
    """
    best, nearby = batch.best(near)
    heads, visible = len(best), batch.visible()
    top = (visible * share).long().clamp(min=1)
    positive = best.gather(-1, _below(top, heads, positives, batch.generator))
    close = top + _below((nearby - top).clamp(min=1), heads, negatives // 2, batch.generator)
    close = best.gather(-1, close.clamp(max=best.shape[-1] - 1))
    negative = torch.cat([close, _below(visible, heads, negatives - negatives // 2, batch.generator)], dim=-1)
    near_scores, far_scores = batch.student.gather(-1, positive), batch.student.gather(-1, negative)
    ordered = batch.teacher.gather(-1, positive).unsqueeze(-1) > batch.teacher.gather(-1, negative).unsqueeze(-2)
    losses = F.softplus(far_scores.unsqueeze(-2) - near_scores.unsqueeze(-1))
    return (losses * ordered).sum() / ordered.sum().clamp(min=1)


def bce(batch: Batch, *, share: float = 0.02) -> Tensor:
    """Weighted binary cross-entropy: is a key among the true top 2%? (after HashAttention, arXiv 2412.14468).

    Both classes weigh the same; the authors' code asks for the top 32 keys and weighs them 20 times. The student's
    scores are taken relative to their mean over the seen keys, so that no threshold has to be learned.
    """
    best, count = batch.best(share)
    ranks = torch.arange(best.shape[-1], device=best.device)
    top = torch.zeros_like(batch.student, dtype=torch.bool).scatter_(-1, best, (ranks < count).expand_as(best))
    seen, visible = batch.seen, batch.visible()
    scores = batch.student - (batch.student * seen).sum(-1, keepdim=True) / visible
    # the middle of the two classes' means stands for the threshold
    middle = 0.5 * (scores * top).sum(-1, keepdim=True) / count
    losses = F.binary_cross_entropy_with_logits(scores - middle, top.to(scores.dtype), reduction="none") * seen
    rest = (visible - count).clamp(min=1)
    return (losses * torch.where(top, 0.5 / count, 0.5 / rest)).sum(-1).mean()


def similarity(batch: Batch, *, share: float = 0.1, most: float = 20.0) -> Tensor:
    """HATA's first term (arXiv 2506.02572, section 3.1): the top 10% are drawn near, the others pushed away.

    A key's weight falls from `most` to 1 over the true top `share` and is -1 beyond. The loss is the weighted sum of
    |h_q - h_k|^2 over a head's pairs, by their number, summed over heads.
    """
    best, count = batch.best(share)
    ranks = torch.arange(best.shape[-1], device=best.device)
    falling = (most - (most - 1) * ranks / (count - 1).clamp(min=1)).clamp(min=1)
    weight = torch.full_like(batch.student, -1.0)
    weight = weight.scatter(-1, best, torch.where(ranks < count, falling, -1.0).expand_as(best)) * batch.seen
    h_q, h_k = _softened(batch)
    apart = h_q.square().sum(-1, keepdim=True) + h_k.square().sum(-1).unsqueeze(1) - 2 * h_q @ h_k.transpose(-1, -2)
    return (weight * apart).sum() / batch.seen.sum().clamp(min=1)


def pair_balance(batch: Batch) -> Tensor:
    """HATA's second term: |sum(h_q + h_k)|^2 over a head's pairs, by their number and the bits', summed over heads."""
    h_q, h_k = _softened(batch)
    seen = batch.seen.to(h_q.dtype)
    total = (seen.sum(-1, keepdim=True) * h_q).sum(1) + (seen.sum(0).unsqueeze(-1) * h_k).sum(1)  # [Hq, bits]
    return (total / seen.sum().clamp(min=1) / h_q.shape[-1]).square().sum()


def balance(batch: Batch) -> Tensor:
    """Bit balance (DASH-KV): the mean of each bit over a head's queries, and over its keys, goes to zero."""
    return sum_of(lambda v, h: torch.tanh(v).mean(-2).square().mean(), batch)


def quantisation(batch: Batch) -> Tensor:
    """Quantisation (DASH-KV): the tanh of every projection goes to -1 or 1."""
    return sum_of(lambda v, h: (torch.tanh(v).abs() - 1).square().mean(), batch)


def decorrelation(batch: Batch) -> Tensor:
    """Decorrelation: bits of the queries, and of the keys, go to being uncorrelated (Wang et al., CVPR 2010)."""

    def correlated(v: Tensor, h: Tensor) -> Tensor:
        rows = h.flatten(0, -2)
        product = rows.T @ rows / len(rows)
        return (product - torch.diag(product.diagonal())).square().mean()

    return sum_of(correlated, batch)


def sum_of(term: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> Tensor:
    """A term of the queries' projections and codes, and the same of the keys'."""
    return term(batch.v_q, batch.h_q) + term(batch.v_k, batch.h_k)


def orthogonality(planes: Tensor) -> Tensor:
    """HATA's third term: the distance |W'W - I| of the planes [heads, D, bits] from orthonormal ones."""
    identity = torch.eye(planes.shape[-1], device=planes.device)
    return torch.linalg.vector_norm(planes.transpose(-1, -2) @ planes - identity)


LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    loss.__name__: loss for loss in (kl, ranking, bce, similarity, pair_balance, balance, quantisation, decorrelation)
}
OF_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"orthogonality": orthogonality}
HATA = "0.01 * similarity + pair_balance + 2 * orthogonality"  # epsilon, lambda and eta of its training


def parse(text: str) -> dict[str, float]:
    """Weights of the terms of "ranking" or "kl + 0.1 * balance".

    Raises:
        ValueError: a term that does not exist or is named twice, or a weight that is not a positive number.
    """
    weights: dict[str, float] = {}
    for term in text.split("+"):
        factor, _, name = term.rpartition("*")
        name = name.strip()
        if name not in LOSSES and name not in OF_WEIGHTS:
            raise ValueError(
                f"loss {text!r} has no known term {name!r}: the terms are {', '.join((*LOSSES, *OF_WEIGHTS))}, joined "
                "as in 'kl + 0.1 * balance'"
            )
        try:
            weight = float(factor) if factor else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"loss {text!r}: the weight of {name} must be a positive number, got {factor.strip()!r}")
        if name in weights:
            raise ValueError(f"loss {text!r} names {name} twice")
        weights[name] = weight
    return weights


def combined(weights: dict[str, float], batch: Batch) -> Tensor:
    """The weighted sum of the terms.

    Raises:
        ValueError: a term of weights, and a batch without any.
    """
    terms = []
    for name, weight in weights.items():
        if name in LOSSES:
            terms.append(weight * LOSSES[name](batch))
        elif batch.planes is not None:
            terms.append(weight * OF_WEIGHTS[name](batch.planes))
        else:
            raise ValueError(f"{name} is a term of weights, but the batch has planes=None")
    return torch.stack(terms).sum()


def _softened(batch: Batch) -> tuple[Tensor, Tensor]:
    """HATA's 2 sigmoid(0.1 x) - 1 of projections: h_q [Hq, T, bits] and h_k [Hq, N, bits]."""
    group = len(batch.v_q) // len(batch.v_k)
    v_k = batch.v_k.repeat_interleave(group, 0) if group > 1 else batch.v_k
    return torch.tanh(0.05 * batch.v_q), torch.tanh(0.05 / batch.unit * v_k)


def _below(limit: Tensor, heads: int, n: int, generator: torch.Generator) -> Tensor:
    """n uniform integers below each limit [T, 1]: int64 [heads, T, n]."""
    uniform = torch.rand(heads, len(limit), n, generator=generator, device=limit.device)
    return torch.minimum((uniform * limit).long(), limit - 1)
