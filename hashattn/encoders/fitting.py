"""How learned hashes are fitted: true logits are the teacher, code inner products the student."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hashattn.encoders.learned import LearnedHash

POSITIVES, NEGATIVES, TRUE_SHARE = 32, 96, 0.03
BALANCE, QUANTISATION = 0.1, 0.1


def kl_loss(student: Tensor, teacher: Tensor, seen: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Listwise KL(teacher || student) over the keys of each query, as in DASH-KV; [..., N] logits."""
    log_student = F.log_softmax(student.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0.0)
    log_teacher = F.log_softmax((teacher / temperature).masked_fill(~seen, -torch.inf), -1)
    p = log_teacher.exp()
    return (p * (log_teacher.masked_fill(~seen, 0.0) - log_student)).sum(-1).mean()


def ranking_loss(
    student: Tensor, teacher: Tensor, seen: Tensor, temperature: float, generator: torch.Generator
) -> Tensor:
    """Bradley-Terry: true top keys should score above random visible keys; pairs that the teacher orders."""
    visible = seen.sum(-1, keepdim=True).expand(*teacher.shape[:-1], 1)
    top = teacher.masked_fill(~seen, -torch.inf).topk(max(1, int(TRUE_SHARE * teacher.shape[-1])), -1).indices
    share = (visible * TRUE_SHARE).clamp(min=1, max=top.shape[-1])
    positive = top.gather(-1, _random_below(share, POSITIVES, generator))
    # visible keys are the first ones: queries are causal and rows of a fit have no padding
    negative = _random_below(visible, NEGATIVES, generator)
    s_pos, s_neg = student.gather(-1, positive), student.gather(-1, negative)
    ordered = teacher.gather(-1, positive).unsqueeze(-1) > teacher.gather(-1, negative).unsqueeze(-2)
    losses = F.softplus(s_neg.unsqueeze(-2) - s_pos.unsqueeze(-1))
    return (losses * ordered).sum() / ordered.sum().clamp(min=1)


LOSSES = {"kl": kl_loss, "ranking": ranking_loss}


def fit(
    encoder: LearnedHash,
    q: Tensor,
    k: Tensor,
    *,
    loss: str,
    steps: int,
    queries: int,
    lr: float,
    temperature: float,
    scale: float | None,
    progress: bool,
) -> None:
    """Fit a learned hash to one layer, in place. On an exception the encoder is as before.

    The centre becomes the mean key. Signs are relaxed to tanh(beta x), beta growing from 1 to 10, in the first half
    of the steps, and taken with a straight-through gradient in the second.

    Args:
        encoder: the hash.
        q: [B, Hq, T, D], post-RoPE queries of the last T of the N positions; they see keys up to their own.
        k: [B, Hkv, N, D], post-RoPE keys.
        loss: "ranking" (Bradley-Terry pairs; the best measured) or "kl" (listwise, as in DASH-KV, with bit balance
            and quantisation terms).
        steps: of Adam.
        queries: drawn at each step.
        lr: peak learning rate; 5% warm-up, then cosine.
        temperature: of the teacher's softmax; used by "kl".
        scale: of the true logits, 1 / sqrt(D) by default.
        progress: show a progress bar (needs tqdm).

    Raises:
        ValueError: shapes that disagree, or an unknown loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    if steps < 1 or queries < 1:
        raise ValueError(f"steps and queries must be at least 1, got {steps} and {queries}")
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q [B, Hq, T, D] and k [B, Hkv, N, D] must share B and D, got {(*q.shape,)} and {(*k.shape,)}"
        )
    if q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(f"q needs Hq a multiple of Hkv, and T <= N, got {(*q.shape,)} for keys {(*k.shape,)}")
    encoder.check_model(q.shape[1], k.shape[1], k.shape[-1])
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    try:
        _optimise(encoder, q.detach().float(), k.detach().float(), LOSSES[loss], loss == "kl", steps, queries, lr,
                  temperature, scale or q.shape[-1] ** -0.5, progress)  # fmt: skip
    except BaseException:
        if "key_net.skip" in before:
            encoder.load_state_dict(before)
        else:
            encoder.query_net = encoder.key_net = None
            encoder.mean = before["mean"]
        raise


def _optimise(encoder, q, k, objective, regularise, steps, queries, lr, temperature, scale, progress):  # type: ignore[no-untyped-def]
    encoder.build(k.shape[-1], k.device)
    encoder.mean = k.mean((0, 2))
    keys, tokens = k.shape[2], q.shape[2]
    generator = torch.Generator(device=k.device).manual_seed(encoder.seed)
    log_scale = torch.tensor(-0.5 * float(torch.tensor(float(encoder.bits)).log()), device=k.device, requires_grad=True)
    parameters = [*{id(p): p for p in encoder.parameters()}.values(), log_scale]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda i: min((i + 1) / max(1, steps // 20), 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * i / steps)))),
    )
    key_scale = (k - encoder.mean.unsqueeze(1)).square().mean().rsqrt()  # tanh wants projections of about one
    columns = torch.arange(keys, device=k.device)
    for step in _bar(range(steps), progress):
        rows = torch.randint(tokens, (min(queries, tokens),), generator=generator, device=k.device)
        seen = columns <= (rows + keys - tokens).unsqueeze(-1)  # [Q, N]
        with torch.enable_grad():
            v_q = encoder.project_query(q[:, :, rows])
            v_k = encoder.project_key(k) * key_scale
            h_q, h_k = (_relax(v, step / steps) for v in (v_q, v_k))
            grouped = h_q.reshape(h_k.shape[0], h_k.shape[1], -1, encoder.bits)
            student = (grouped @ h_k.transpose(-1, -2)).view(*h_q.shape[:3], keys) * log_scale.exp()
            with torch.no_grad():
                true = q[:, :, rows].reshape(k.shape[0], k.shape[1], -1, k.shape[-1])
                teacher = (true @ k.transpose(-1, -2)).view(student.shape) * scale
            value = objective(student, teacher, seen, temperature, generator)
            if regularise:
                value = value + sum(
                    BALANCE * h.mean(2).square().mean() + QUANTISATION * (h.abs() - 1).square().mean()
                    for h in (v_q.tanh(), v_k.tanh())
                )
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()


def _relax(v: Tensor, done: float) -> Tensor:
    if done < 0.5:
        return torch.tanh(v * (1 + 18 * done))
    soft = v.clamp(-1, 1)
    return soft + (torch.where(v >= 0, 1.0, -1.0) - soft).detach()


def _random_below(limit: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n uniform integers below each limit [..., 1]."""
    uniform = torch.rand(*limit.shape[:-1], n, generator=generator, device=limit.device)
    return (uniform * limit).long().clamp(max=limit.long() - 1)


def _bar(steps: range, progress: bool):  # type: ignore[no-untyped-def]
    if not progress:
        return steps
    from hashattn.extras import require

    return require("tqdm", "fit", "a progress bar").tqdm(steps, desc="fitting", unit="step")
