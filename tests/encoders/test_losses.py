"""Losses: what each is least for, what no loss may look at, and what cannot be a loss."""

import math

import pytest
import torch

from hashattn.encoders.losses import HATA, LOSSES, Batch, combined, orthogonality, parse
from tests.structured import generator, raises_naming

HEADS, QUERIES, KEYS, BITS = 4, 3, 90, 16


def batch(seed=0, student=None, **parts):
    g = generator(seed)
    teacher = 3 * torch.randn(HEADS, QUERIES, KEYS, generator=g)
    v_q, v_k = torch.randn(HEADS, QUERIES, BITS, generator=g), torch.randn(HEADS // 2, KEYS, BITS, generator=g)
    seen = torch.arange(KEYS) <= torch.tensor([[69], [75], [89]])
    given = {"v_q": v_q, "v_k": v_k, "h_q": v_q.sign(), "h_k": v_k.sign(), "temperature": 2.0, **parts}
    student = torch.randn(HEADS, QUERIES, KEYS, generator=g) if student is None else student(teacher)
    return Batch(teacher, student, seen, generator=generator(seed), **given)


def of(name, *args, **parts):
    return LOSSES[name](batch(*args, **parts)).item()


def test_kl_is_that_of_float64_and_zero_for_the_teachers_own_logits():
    b = batch()
    teacher = (b.teacher.double() / 2).masked_fill(~b.seen, -math.inf).log_softmax(-1)
    student = b.student.double().masked_fill(~b.seen, -math.inf).log_softmax(-1)
    by_hand = torch.where(b.seen, teacher.exp() * (teacher - student), 0.0).sum(-1).mean()
    assert LOSSES["kl"](b).item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert of("kl", student=lambda teacher: teacher / 2 + 7) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["kl", "ranking", "bce"])
def test_a_student_that_orders_keys_as_the_teacher_does_has_less_to_lose(name):
    right, none, wrong = (of(name, student=lambda t, f=f: f * t) for f in (1.0, 0.0, -1.0))
    assert right < none < wrong


def test_ranking_of_scores_that_say_nothing_is_log_2_and_pairs_in_order_by_far_cost_nothing():
    assert of("ranking", student=torch.zeros_like) == pytest.approx(math.log(2))
    assert of("ranking", student=lambda teacher: 1000 * teacher) == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("name", ["kl", "ranking", "bce", "similarity"])
def test_keys_that_a_query_does_not_see_change_nothing(name):
    b = batch()
    other = Batch(
        torch.where(b.seen, b.teacher, 50.0), torch.where(b.seen, b.student, -50.0), b.seen, b.v_q, b.v_k, b.h_q, b.h_k,
        b.temperature, generator(0),
    )  # fmt: skip
    assert LOSSES[name](other).item() == pytest.approx(LOSSES[name](b).item(), rel=1e-5)


def test_bce_weighs_both_classes_alike():
    b = batch(student=torch.zeros_like)
    assert LOSSES["bce"](b).item() == pytest.approx(math.log(2), rel=1e-5)


def test_similarity_draws_the_best_keys_near_and_pushes_the_others_away():
    b = batch()
    best = (b.teacher.masked_fill(~b.seen, -math.inf).topk(6, -1).indices[..., :1] == torch.arange(KEYS)).float()
    one_query = {"h_q": torch.ones(HEADS, QUERIES, 1), "v_q": torch.ones(HEADS, QUERIES, 1)}
    k = (2 * best[:, 0] - 1).unsqueeze(-1)  # the best key agrees with the query, all others differ
    near = batch(h_k=k, v_k=k, **one_query)
    far = batch(h_k=-k, v_k=-k, **one_query)
    assert LOSSES["similarity"](near) < LOSSES["similarity"](far)


def test_hatas_terms_are_those_of_the_paper():
    """2506.02572, section 3.1: sum(s |h_q - h_k|^2), bits that are 0 as often as 1, near orthogonal planes."""
    b, unit = batch(), 4.0
    scaled = batch(v_k=unit * b.v_k, unit=unit)  # what fitting multiplies keys with is taken off again
    h_q, h_k = (2 * torch.sigmoid(0.1 * v.double()) - 1 for v in (b.v_q, b.v_k.repeat_interleave(2, 0)))
    similarity, total, pairs = 0.0, torch.zeros(HEADS, BITS, dtype=torch.float64), 0
    for t in range(QUERIES):
        seen = int(b.seen[t].sum())
        pairs += seen
        for h in range(HEADS):
            best = b.teacher[h, t, :seen].argsort(descending=True).tolist()
            top = seen // 10
            s = {n: 20 - 19 * rank / (top - 1) for rank, n in enumerate(best[:top])}
            for n in range(seen):
                similarity += s.get(n, -1.0) * (h_q[h, t] - h_k[h, n]).square().sum().item()
                total[h] += h_q[h, t] + h_k[h, n]
    assert LOSSES["similarity"](scaled).item() == pytest.approx(similarity / pairs, rel=1e-4)
    assert LOSSES["pair_balance"](scaled).item() == pytest.approx(
        (total / pairs / BITS).square().sum().item(), rel=1e-4
    )
    planes = torch.randn(2, 8, BITS, generator=generator(1))
    uneven = planes.double().mT @ planes.double() - torch.eye(BITS, dtype=torch.float64)
    assert orthogonality(planes).item() == pytest.approx(uneven.norm().item(), rel=1e-5)
    assert orthogonality(torch.linalg.qr(torch.randn(2, BITS, BITS)).Q) < 1e-5
    whole = batch(v_k=unit * b.v_k, unit=unit, planes=planes)
    parts = 0.01 * similarity / pairs + (total / pairs / BITS).square().sum().item() + 2 * uneven.norm().item()
    assert combined(parse(HATA), whole).item() == pytest.approx(parts, rel=1e-4)
    raises_naming(ValueError, "orthogonality", "planes=None")(lambda: combined(parse(HATA), b))


def test_balance_quantisation_and_decorrelation_are_zero_where_they_should_be():
    half = 50 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).expand(HEADS, 4, 2)
    good = {"v_q": half, "v_k": half, "h_q": half.sign(), "h_k": half.sign()}
    for name in ("balance", "quantisation", "decorrelation"):
        assert of(name, **good) == pytest.approx(0, abs=1e-6)
    same = half[..., :1].expand(-1, -1, 2)
    assert of("decorrelation", **{**good, "h_q": same.sign()}) > 0.4
    assert of("balance", **{**good, "v_q": half.abs()}) == pytest.approx(1)
    assert of("quantisation", **{**good, "v_k": 0 * half}) == pytest.approx(1)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_gradient(name):
    b = batch()
    h_q, h_k = b.v_q.tanh().requires_grad_(), b.v_k.tanh().requires_grad_()
    student = (h_q.view(2, -1, BITS) @ h_k.transpose(-1, -2)).view(HEADS, QUERIES, KEYS)
    relaxed = Batch(b.teacher, student, b.seen, h_q * 1, h_k * 1, h_q, h_k, 2.0, generator(0))
    LOSSES[name](relaxed).backward()
    assert h_k.grad.isfinite().all()
    assert h_k.grad.abs().sum() > 0


def test_terms_are_added_with_their_weights():
    assert parse("ranking") == {"ranking": 1.0}
    assert parse(" kl +0.1*balance+ 2 * quantisation") == {"kl": 1.0, "balance": 0.1, "quantisation": 2.0}
    total = combined(parse("kl + 0.1 * balance"), batch())
    assert total.item() == pytest.approx(of("kl") + 0.1 * of("balance"), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hinge", ["hinge", "ranking", "kl"]),
        ("", ["ranking"]),
        ("kl +", ["kl", "ranking"]),
        ("x * kl", ["weight of kl", "'x'"]),
        ("-1 * kl", ["weight of kl", "-1"]),
        ("nan * kl", ["weight of kl", "nan"]),
        ("kl + kl", ["kl twice"]),
    ],
)
def test_what_is_no_loss_is_refused(text, words):
    raises_naming(ValueError, *words)(lambda: parse(text))
