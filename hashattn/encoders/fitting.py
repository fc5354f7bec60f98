"""How learned hashes are fitted: true logits are the teacher, code inner products the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hashattn.core.checks import check_fit
from hashattn.core.lasting import lasting
from hashattn.encoders.bias import KeyBias
from hashattn.encoders.hash_net import HashNet
from hashattn.encoders.losses import Batch, combined, parse
from hashattn.encoders.sample import Sample

FEWEST = 64  # a query that sees fewer keys teaches nothing
LARGEST_GRADIENT = 1.0


class Learner(Protocol):
    """What is fitted: see :class:`hashattn.encoders.learned.LearnedHash`."""

    query_bits: int
    seed: int
    fits: int
    mean: Tensor
    query_net: HashNet | None
    key_net: HashNet | None
    key_bias: KeyBias | None

    @property
    def sign_bits(self) -> int: ...
    def build(self, head_dim: int, device: torch.device | str = "cpu") -> Any: ...
    def build_bias(self, heads: int) -> Any: ...
    def code_heads(self, kv_heads: int) -> int: ...
    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None: ...
    def centred(self, k: Tensor, centre: Tensor | None = None) -> Tensor: ...
    def project_query(self, q: Tensor) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Settings:
    """How a hash is fitted.

    Args:
        steps: of Adam.
        queries: drawn at each step.
        keys: drawn at each step, of those that there are; 0 for all. The best share of some keys stands for the best
            share of all of them.
        lr: peak learning rate; 5% warm-up, then cosine.
        temperature: of the teacher's softmax; used by "kl".
        scale: of the true logits, 1 / sqrt(D) by default.
        continuation: share of the steps with tanh; 0 takes signs from the start.
        seed: of what is drawn; the encoder's by default.
    """

    steps: int = 400
    queries: int = 64
    keys: int = 2048
    lr: float = 3e-3
    temperature: float = 2.0
    scale: float | None = None
    continuation: float = 0.5
    seed: int | None = None


@lasting
def fit(
    encoder: Learner,
    samples: Sequence[Sample],
    *,
    loss: str = "ranking",
    every: int = 50,
    watch: Callable[[int, float], bool | None] | None = None,
    **settings: Any,
) -> None:
    """Fit a learned hash to one layer, in place.

    The centre becomes the mean key. Signs are relaxed to tanh(beta x), beta growing from 1 to 10, in the first part
    of the steps, and taken with a straight-through gradient in the rest. A multi-bit query is fitted as floats. The
    student's temperature is learned.

    Args:
        encoder: the hash.
        samples: of the layer, on one device; each step draws one. Those with a question count twice, once with the
            queries of the question and its answer alone: there are few, and they are the ones that must find.
        loss: terms by name, such as "ranking" or "kl + 0.1 * balance"; see :mod:`hashattn.encoders.losses`.
        every: steps between two calls of watch, and between two states to go back to.
        watch: called with the step and its loss, when the encoder can be used; returning True stops.
        settings: see :class:`Settings`.

    Raises:
        ValueError: samples that disagree with each other or with the encoder, or an unknown loss.
        FloatingPointError: the loss is not finite; the encoder is left as it was when it last was. After any other
            exception it is as it was before.
    """
    chosen = Settings(**settings)
    weights = parse(loss)
    steps = chosen.steps
    check_options(steps=steps, queries=chosen.queries, every=every)
    check_samples(encoder, samples)
    before = state_of(encoder)
    try:
        run = Run(encoder, samples, weights, chosen)
        good = state_of(encoder)
        for step in range(steps):
            value = run.step(step)
            if not math.isfinite(value):
                restore(encoder, good)
                raise FloatingPointError(
                    f"the loss {loss!r} is {value} at step {step}; the encoder is as it was at step "
                    f"{step - step % every}; a lower lr, such as 1e-3, may help"
                )
            if (step + 1) % every == 0 or step + 1 == steps:
                good = state_of(encoder)
                if watch is not None and watch(step + 1, value):
                    break
    except FloatingPointError:
        raise
    except BaseException:
        restore(encoder, before)
        raise


class Run:
    """One optimisation: its optimiser, its schedule and its random numbers."""

    def __init__(
        self, encoder: Learner, samples: Sequence[Sample], weights: dict[str, float], settings: Settings
    ) -> None:
        questions = [asked for sample in samples if (asked := sample.question()) is not None and teaches(asked)]
        self.encoder, self.samples, self.weights = encoder, [*samples, *questions], weights
        self.steps, self.queries, self.keys = settings.steps, settings.queries, settings.keys
        self.temperature, self.continuation = settings.temperature, settings.continuation
        self.scale = samples[0].q.shape[-1] ** -0.5 if settings.scale is None else settings.scale
        steps, seed = settings.steps, encoder.seed if settings.seed is None else settings.seed
        device = samples[0].k.device
        encoder.build(samples[0].k.shape[-1], device)
        encoder.mean = torch.stack([s.k.float().mean(1) for s in samples]).mean(0)  # [Hkv, D]
        spread = torch.stack([(s.k.float() - encoder.mean.unsqueeze(1)).square().mean() for s in samples])
        self.unit = float(spread.mean().rsqrt())  # tanh wants projections of about one
        encoder.build_bias(encoder.code_heads(len(samples[0].k)))
        self.generator = torch.Generator(device=device).manual_seed(seed)
        start = -0.5 * math.log(encoder.sign_bits)
        self.log_scale = torch.tensor(start, device=device, requires_grad=True)
        self.parameters = [*{id(p): p for p in encoder.parameters()}.values(), self.log_scale]
        self.optimiser = torch.optim.Adam(self.parameters, lr=settings.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda i: min((i + 1) / max(1, steps // 20), 0.5 + 0.5 * math.cos(math.pi * i / steps)),
        )

    def step(self, step: int) -> float:
        """One step of Adam on a drawn batch; returns the loss before it, and does nothing if that is not finite."""
        with torch.enable_grad():
            value = combined(self.weights, self.batch(step / self.steps))
            self.optimiser.zero_grad()
            value.backward()
        found = float(value.detach())
        if math.isfinite(found):
            torch.nn.utils.clip_grad_norm_(self.parameters, LARGEST_GRADIENT)
            self.optimiser.step()
            self.schedule.step()
        return found

    def batch(self, done: float) -> Batch:
        """Queries and keys of one sample, as far as the share `done` of the steps has relaxed them."""
        encoder, generator = self.encoder, self.generator
        sample = self.samples[int(self._draw(len(self.samples), 1))]
        able = (sample.positions >= least(sample)).nonzero().squeeze(-1)
        rows = able[self._draw(len(able), self.queries)]
        columns = torch.arange(sample.k.shape[1], device=sample.k.device)
        if 0 < self.keys < len(columns):
            drawn = torch.randperm(len(columns), generator=generator, device=columns.device)
            columns = drawn[: self.keys].sort().values
        q, k = sample.q[:, rows].float(), sample.k[:, columns].float()
        seen = columns <= sample.positions[rows].unsqueeze(-1)  # [T, N]
        centred = encoder.centred(k.unsqueeze(0))
        assert encoder.key_net is not None
        v_q, v_k = encoder.project_query(q.unsqueeze(0))[0], encoder.key_net(centred)[0] * self.unit
        h_q = v_q if encoder.query_bits > 1 else self._relax(v_q, done)
        h_k = self._relax(v_k, done)
        student = grouped_product(h_q, h_k)
        if encoder.key_bias is not None:  # a bit less of distance is two more of the inner product
            bias = encoder.key_bias.relaxed(centred, hard=done >= self.continuation)[0]
            student = student + 2 * bias.repeat_interleave(len(q) // len(bias), 0).unsqueeze(1)
        with torch.no_grad():
            teacher = grouped_product(q, k) * self.scale
        return Batch(
            teacher,
            student * self.log_scale.exp(),
            seen,
            v_q,
            v_k,
            h_q,
            h_k,
            self.temperature,
            generator,
            self.unit,
            encoder.key_net.skip,
        )

    def _relax(self, v: Tensor, done: float) -> Tensor:
        if done < self.continuation:
            return torch.tanh(v * (1 + 9 * done / self.continuation))
        soft = v.clamp(-1, 1)
        return soft + (torch.where(v >= 0, 1.0, -1.0) - soft).detach()

    def _draw(self, below: int, n: int) -> Tensor:
        return torch.randint(below, (n,), generator=self.generator, device=self.log_scale.device)


def grouped_product(q: Tensor, k: Tensor) -> Tensor:
    """[Hq, T, X] and [H, N, X] -> [Hq, T, N]: every query with the keys of its head."""
    return (q.reshape(len(k), -1, q.shape[-1]) @ k.transpose(-1, -2)).view(*q.shape[:2], k.shape[1])


def least(sample: Sample) -> int:
    """The first column whose query sees enough keys to be fitted to."""
    return min(FEWEST, sample.k.shape[1]) - 1


def teaches(sample: Sample) -> bool:
    """Whether any of its queries sees enough keys."""
    return int(sample.positions.max()) >= least(sample)


def check_options(**numbers: int) -> None:
    """Raise ValueError unless all of them are at least 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def check_samples(encoder: Learner, samples: Sequence[Sample]) -> None:
    """Raise ValueError unless there are samples, of one shape of heads, that the encoder can be fitted to."""
    if not samples:
        raise ValueError("samples must hold at least one, got none")
    first = samples[0]
    q_heads, kv_heads, head_dim = len(first.q), len(first.k), first.k.shape[-1]
    for sample in samples:
        heads = len(sample.q), len(sample.k), sample.k.shape[-1]
        if heads != (q_heads, kv_heads, head_dim):
            raise ValueError(
                f"samples must share Hq, Hkv and D: {first.name!r} has {(q_heads, kv_heads, head_dim)}, "
                f"{sample.name!r} has {heads}"
            )
        if not len(sample.positions):
            raise ValueError(f"sample {sample.name!r} holds no queries")
        if not teaches(sample):
            raise ValueError(f"sample {sample.name!r} has no query that sees {FEWEST} keys or more")
    encoder.check_model(q_heads, kv_heads, head_dim)


def samples_of(q: Tensor, k: Tensor) -> list[Sample]:
    """A sample a row of q [B, Hq, T, D], the queries of the last T of N positions, and k [B, Hkv, N, D].

    Raises:
        TypeError, ValueError: as check_fit(); shapes that disagree.
    """
    check_fit(q=q, k=k)
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q [B, Hq, T, D] and k [B, Hkv, N, D] must share B and D, got {(*q.shape,)} and {(*k.shape,)}"
        )
    if q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(f"q needs Hq a multiple of Hkv, and T <= N, got {(*q.shape,)} for keys {(*k.shape,)}")
    keys = k.shape[2]
    positions = torch.arange(keys - q.shape[2], keys, device=k.device)
    pairs = zip(q.detach().float(), k.detach().float(), strict=True)
    return [Sample(own_q, own_k, positions, keys, f"row {i}") for i, (own_q, own_k) in enumerate(pairs)]


def state_of(encoder: Learner) -> dict[str, Tensor]:
    """A copy of its weights."""
    return {name: value.detach().clone() for name, value in encoder.state_dict().items()}


def restore(encoder: Learner, state: dict[str, Tensor]) -> None:
    """Give it the weights of :func:`state_of`, without counting as a fit."""
    fits = encoder.fits
    if "key_net.skip" in state:
        encoder.load_state_dict(state)
    else:  # there were none
        encoder.query_net = encoder.key_net = encoder.key_bias = None
        encoder.mean = state["mean"]
    encoder.fits = fits
