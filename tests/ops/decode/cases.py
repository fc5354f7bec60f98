"""Inputs that the fused decode step's tests on CPU and GPU share, and the comparison with its reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hashattn.core.types import Selection
from hashattn.ops.decode import Before, Estimate, Inputs, Outputs, Rule, Sizes, Stored, reference
from tests.structured import generator

WORST = 2**31 - 1


def stored(x: Inputs, **changes: Tensor) -> Inputs:
    """The same over other columns."""
    return replace(x, stored=replace(x.stored, **changes))


def moved(x: Inputs, device: str) -> Inputs:
    """The same on another device."""
    held = Stored(*(getattr(x.stored, name).to(device) for name in ("keys", "values", "codes", "length")))
    before = None if x.before is None else Before(*(y.to(device) for y in x.before))
    moved = replace(x, q=x.q.to(device), query=x.query.to(device), stored=held, starts=x.starts.to(device))
    return replace(moved, before=before)


def ready(x: Inputs, rule: Rule, **changes: Any) -> Inputs:
    """A first step by a rule, with a workspace that holds anything."""
    x = replace(x, rule=rule, **changes)
    sizes = Sizes.of(x)
    bounds = torch.zeros(sizes.state, dtype=torch.int32, device=x.q.device)
    return replace(
        x, bounds=bounds, workspace=torch.full((sizes.workspace,), 0xA5, dtype=torch.uint8, device=x.q.device)
    )


def inputs(
    seed: int = 0, *, batch: int = 1, kv_heads: int = 1, group: int = 4, tokens: int = 1, filled: int = 2500,
    room: int = 4096, dim: int = 64, words: int = 1, planes: int = 1, starts: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32, clustered: bool = False, biased: bool = False,
) -> Inputs:  # fmt: skip
    """Random keys and codes, NaN outside the filled columns; clustered: the near codes lie in 2 % of the columns;
    biased: the queries' last byte is zero, and most keys' is near 128."""
    g = generator(seed)

    def bits(*shape: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, generator=g)

    q = torch.randn(batch, kv_heads * group, tokens, dim, generator=g).to(dtype)
    keys, values = (torch.randn(batch, kv_heads, room, dim, generator=g).to(dtype) for _ in range(2))
    keys[:, :, filled:], values[:, :, filled:] = torch.nan, torch.nan
    codes, query = bits(batch, kv_heads, room, words), bits(batch, kv_heads * group, tokens, planes, words)
    if biased:
        query[..., -1] &= (1 << 56) - 1
        spread = torch.where(torch.rand(codes.shape[:3], generator=g) < 0.9, 24, 256)
        penalty = 128 + ((torch.rand(codes.shape[:3], generator=g) - 0.5) * spread).long()
        codes[..., -1] = codes[..., -1] & ((1 << 56) - 1) | penalty << 56
    if clustered:
        few = filled // 50
        near = bits(batch, kv_heads, few, words) & bits(batch, kv_heads, few, words)
        codes[:, :, filled // 2 : filled // 2 + few] = query[:, ::group, 0, -1].unsqueeze(2) ^ near
    first = torch.tensor(starts or [0] * batch, dtype=torch.int32)
    held = Stored(keys, values, codes, torch.tensor([filled], dtype=torch.int32))
    return Inputs(q, query, held, first, Rule(k=1), dim**-0.5)


CASES: list[tuple[dict[str, Any], Rule]] = [
    ({"kv_heads": 2}, Rule(k=100)),
    ({"group": 3, "batch": 2, "words": 2, "starts": (0, 700)}, Rule(share=0.05, sinks=4, recents=20)),
    ({"tokens": 2, "planes": 2, "kv_heads": 2}, Rule(k=100, shared=True)),
    ({"group": 5, "tokens": 3, "filled": 70, "room": 80}, Rule(k=33)),
    ({"group": 8, "dim": 96, "words": 4, "filled": 300, "room": 333}, Rule(k=40, shared=True, recents=50)),
    ({"group": 16, "dim": 128, "filled": 500, "room": 512}, Rule(share=0.1)),
    ({"group": 1, "dim": 256, "filled": 130, "room": 144, "starts": (129,)}, Rule(k=50, sinks=3)),
    ({"clustered": True, "filled": 4000}, Rule(k=70)),
    ({"filled": 800, "room": 896}, Rule(share=1.0, radius=24, sinks=2)),
    ({}, Rule(k=30, radius=26)),
    ({"tokens": 2}, Rule(k=64, shared=True, radius=110, recents=5)),
    ({"filled": 300, "room": 320}, Rule(share=1.0)),
    ({"filled": 60, "room": 64}, Rule(k=10, sinks=30, recents=40)),
    ({"biased": True, "group": 3, "batch": 2, "words": 2, "starts": (0, 700)}, Rule(k=90, sinks=4, biased=True)),
    ({"biased": True, "kv_heads": 2}, Rule(share=0.05, shared=True, recents=20, biased=True)),
    ({"biased": True, "filled": 800, "room": 896}, Rule(share=1.0, radius=150, biased=True)),
    ({"biased": True, "words": 2, "group": 5, "tokens": 2}, Rule(k=64, shared=True, biased=True)),
    ({"filled": 900, "room": 912}, Rule(share=0.01, sinks=4, recents=20, min_k=40)),  # a floor beyond the forced keys
    ({"tokens": 2, "filled": 700, "room": 704}, Rule(share=0.01, min_k=30, shared=True)),
    ({"filled": 200, "room": 208}, Rule(k=2**40, sinks=2**31 - 1, recents=2**33)),  # beyond int32, alone and summed
    ({"filled": 150, "room": 160, "tokens": 2}, Rule(share=1.0, min_k=2**62, recents=2**31, radius=2**33, shared=True)),
]
TIER_CASES: list[tuple[dict[str, Any], Rule]] = [
    ({"kv_heads": 2, "group": 2, "words": 2, "filled": 2100, "room": 2112}, Rule(share=0.05, critical=0.025)),
    (
        {"tokens": 3, "group": 3, "batch": 2, "filled": 250, "room": 256, "starts": (0, 180)},
        Rule(share=0.2, critical=0.03, shared=True, sinks=2, recents=9),
    ),
    ({"group": 1, "planes": 2, "filled": 300, "room": 320}, Rule(share=0.5, critical=0.45)),
    (
        {"group": 4, "planes": 2, "words": 2, "dim": 128, "filled": 900, "room": 912},
        Rule(share=0.1, critical=0.05, shared=True),
    ),
    ({"clustered": True, "group": 1, "filled": 4000, "dim": 96}, Rule(share=0.03, critical=0.01, recents=20)),
    (
        {"group": 2, "tokens": 2, "words": 4, "dim": 256, "filled": 140, "room": 144, "starts": (138,)},
        Rule(share=1.0, critical=0.3),
    ),
    ({"filled": 500, "room": 512}, Rule(share=0.1, critical=0.02, sinks=9, recents=30)),  # more are forced
    ({"group": 2, "words": 4, "filled": 600, "room": 608}, Rule(share=0.9, critical=0.003)),  # further apart than bins
    ({"group": 2, "filled": 400, "room": 416}, Rule(share=0.5, critical=0.1, radius=27)),
    ({"group": 2, "filled": 600, "room": 608}, Rule(share=0.04, critical=0.01, sinks=4, recents=9, min_k=8)),
]
CALIBRATED_CASES: list[tuple[dict[str, Any], Rule]] = [  # agreement, a prior, both, with tiers
    ({"kv_heads": 2, "filled": 600, "room": 608}, Rule(k=60, vote_share=0.3, vote_discount=2)),
    ({"group": 2, "words": 2}, Rule(k=60, prior_ratio=1.0, prior_discount=3)),
    (
        {"group": 3, "batch": 2, "words": 2, "filled": 900, "room": 912, "starts": (0, 700)},
        Rule(share=0.05, sinks=4, recents=20, vote_share=0.4, vote_discount=2, prior_ratio=1.0, prior_discount=2),
    ),
    (
        {"tokens": 2, "planes": 2, "kv_heads": 2, "filled": 500, "room": 512},
        Rule(k=100, shared=True, vote_share=0.5, vote_discount=1, prior_ratio=0.5, prior_discount=4),
    ),
    (
        {"clustered": True, "group": 2, "filled": 4000},
        Rule(k=70, vote_share=0.1, vote_discount=3, prior_ratio=0, prior_discount=1),
    ),
    ({"group": 5, "tokens": 3, "filled": 70, "room": 80}, Rule(k=33, vote_share=0.5, vote_discount=20)),
    ({"filled": 300, "room": 320}, Rule(share=1.0, vote_share=0.5, vote_discount=2, prior_ratio=9, prior_discount=2)),
    ({"filled": 60, "room": 64}, Rule(k=10, sinks=30, recents=40, vote_share=0.5, vote_discount=2)),  # all are forced
    (
        {"filled": 900, "room": 912},
        Rule(share=0.1, sinks=3, vote_share=0.2, vote_discount=-3, prior_ratio=1, prior_discount=-2),
    ),
    (
        {"biased": True, "group": 3, "words": 2, "filled": 700, "room": 704, "starts": (50,)},
        Rule(k=90, sinks=4, biased=True, vote_share=0.3, vote_discount=5, prior_ratio=0.9, prior_discount=-4),
    ),
    (
        {"kv_heads": 2, "group": 2, "words": 2, "filled": 900, "room": 912},
        Rule(share=0.05, critical=0.025, vote_share=0.3, vote_discount=2, prior_ratio=1.0, prior_discount=2),
    ),
    (
        {"tokens": 3, "group": 3, "batch": 2, "filled": 250, "room": 256, "starts": (0, 180)},
        Rule(share=0.2, critical=0.03, shared=True, sinks=2, recents=9, vote_share=0.5, vote_discount=2,
             prior_ratio=2.0, prior_discount=1),
    ),
    (
        {"group": 1, "planes": 2, "filled": 300, "room": 320, "dim": 128},
        Rule(share=0.5, critical=0.45, min_k=8, recents=4, prior_ratio=1.0, prior_discount=2),
    ),
    (
        {"group": 1, "dim": 256, "filled": 130, "room": 144, "starts": (129,)},
        Rule(k=50, sinks=3, vote_share=0.5, vote_discount=2, prior_ratio=1.0, prior_discount=2),
    ),
]  # fmt: skip
LOCAL_CASES: list[tuple[dict[str, Any], Rule]] = [
    ({"kv_heads": 2}, Rule(k=64, chunks=4)),
    ({"group": 3, "batch": 2, "words": 2, "starts": (0, 700)}, Rule(k=96, chunks=3, sinks=4, recents=20)),
    ({"tokens": 3, "planes": 2, "filled": 300, "room": 333}, Rule(k=64, chunks=8, recents=40)),
    ({"group": 1, "dim": 256, "filled": 130, "room": 144, "starts": (129,)}, Rule(k=24, chunks=3, sinks=3)),
    ({"clustered": True, "filled": 4000}, Rule(k=64, chunks=1)),
    ({"group": 2, "filled": 9000, "room": 9001, "dim": 96}, Rule(k=32, chunks=2, sinks=1)),
    ({"group": 8, "words": 4, "filled": 70, "room": 80}, Rule(k=80, chunks=10)),
    ({"filled": 500, "room": 512, "dim": 128}, Rule(k=512, chunks=8)),
    ({"biased": True, "kv_heads": 2, "batch": 2, "starts": (3, 0)}, Rule(k=64, chunks=4, recents=9, biased=True)),
    ({"biased": True, "words": 2, "filled": 9000, "room": 9001}, Rule(k=64, chunks=2, biased=True)),
]

BEYOND = [  # numbers beyond 32 bits, which mean everything
    Rule(k=2**31 + 5),
    Rule(k=2**32 + 1),
    Rule(k=9, sinks=2**31 - 1, recents=2**31 - 1),
    Rule(k=9, recents=2**40),
    Rule(share=0.1, sinks=2**31 + 7),
    Rule(k=2**63 - 1, sinks=2**31, recents=3, shared=True),
]


def shifted(x: Tensor) -> Tensor:
    """The same numbers, contiguous, where they begin one element after a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def norms_of(x: Inputs, bits: int) -> Estimate:
    """Norms of the keys about a random centre, NaN outside the filled columns; the room is another than the keys'."""
    keys = x.stored.keys
    centre = torch.randn(keys.shape[0], keys.shape[1], keys.shape[3], generator=generator(bits)).to(keys.device)
    norms = (keys.float() - centre.unsqueeze(2)).norm(dim=-1, keepdim=True).bfloat16()
    norms = torch.nn.functional.pad(norms, (0, 0, 0, 5), value=torch.nan)
    return Estimate(norms, centre, torch.tensor([0.8], device=keys.device), bits)


def kept_before(x: Inputs, slots: int = 90, shared: bool = False) -> Before:
    """What a layer before might have kept, of a few keys that heads agree on and others; some slots are empty."""
    g = generator(slots)
    (batch, heads, tokens), filled = x.q.shape[:3], int(x.stored.length)
    rows = batch, x.stored.keys.shape[1] if shared else heads, tokens
    few = torch.randperm(filled, generator=g)[: max(1, filled // 9)]
    ids = torch.stack([few[torch.randperm(len(few), generator=g)][:slots] for _ in range(math.prod(rows))])
    ids = torch.nn.functional.pad(ids, (2, slots - ids.shape[1]), value=-1).view(*rows, -1).to(torch.int32)
    logits = 4 * torch.randn(batch, heads, tokens, ids.shape[-1], generator=g)
    empty = (ids < 0).repeat_interleave(heads // rows[1], 1)
    return Before(ids.to(x.q.device), logits.masked_fill(empty, -torch.inf).softmax(-1).to(x.q.device))


def only_read(x: Inputs, ids: Tensor, tier: Tensor) -> Inputs:
    """The same with NaN for every key that is not critical to a query of its head."""
    keys = x.stored.keys
    heads, room = keys.shape[1:3]
    read = ids.masked_fill((ids < 0) | (tier == 1), room).unflatten(1, (heads, -1)).flatten(2).long()
    away = torch.ones(len(ids), heads, room + 1, dtype=torch.bool, device=ids.device).scatter_(2, read, False)
    return stored(x, keys=keys.masked_fill(away[..., :room].unsqueeze(-1), torch.nan))


def by_column(selection: Selection, slots: int) -> tuple[Tensor, Tensor]:
    """Columns in ascending order, in this many slots, empty ones first, and their tiers."""
    ids, order = selection.ids.sort(-1)
    assert selection.tier is not None and (ids[..., :-slots] == -1).all()
    return ids[..., -slots:], selection.tier.gather(-1, order)[..., -slots:]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers, so that what a step leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


HINTS = (None, None, 0, WORST, 16 * 20)  # what bounds hold before a step; None: what the step before left


def agrees(decode: Any, x: Inputs, rule: Rule, *, causal: bool = True, hints: tuple[int | None, ...] = HINTS) -> None:
    """The step's keys are the reference's, its outputs within rounding, and bitwise the same whatever the bounds.

    With a rule of tiers, tiers are the reference's too, and medium keys are not read.
    """
    estimate = norms_of(x, 64 * x.stored.codes.shape[3] - 3) if rule.critical is not None else None
    x, numbers, first = ready(x, rule, causal=causal, estimate=estimate), rule.chunks or 1, None
    expected = reference(x)
    readable, slots = x if estimate is None else only_read(x, *expected[2:4]), expected.ids.shape[-1]
    for wrong in hints:
        if wrong is not None:
            x.bounds[:numbers].fill_(wrong)
        with poisoned():
            found = decode(readable)
        for own, of_reference, empty in zip(found[2:4], expected[2:4], (-1, 0), strict=True):
            assert (own is None) == (of_reference is None)
            if own is not None:
                assert torch.equal(own[..., :slots], of_reference), (rule, wrong)
                assert (own[..., slots:] == empty).all()
        assert (found.weights is None) == (expected.weights is None)
        if found.weights is not None and expected.weights is not None:
            assert torch.allclose(found.weights[..., :slots], expected.weights, rtol=1e-3, atol=1e-6), (rule, wrong)
            assert (found.weights[..., slots:] == 0).all()
        assert not x.bounds[numbers:].any()
        first = found if first is None else first
        assert same(found, first), (rule, wrong)
    keys, values = (x.stored.keys[:, :, : int(x.stored.length)].double(), x.stored.values[:, :, : int(x.stored.length)])
    exact = reference(replace(in_float64(x), estimate=estimate))
    spacing = torch.finfo(x.q.dtype).eps
    size = values.double().abs().max()
    # p and the output are rounded to the values' dtype; sums are float32 over at most 4,096 keys
    assert (first.out.double() - exact.out).abs().max() <= 3 * spacing * size + 1e-5 * size, rule
    seen = torch.isfinite(exact.lse)
    assert torch.equal(torch.isfinite(first.lse), seen)
    logit = (x.q.double().norm(dim=-1).max() * keys.norm(dim=-1).max()) * x.scale
    assert ((first.lse - exact.lse)[seen].abs() <= 1e-6 * logit + 1e-5).all()


def in_float64(x: Inputs) -> Inputs:
    """The same in float64."""
    return replace(stored(x, keys=x.stored.keys.double(), values=x.stored.values.double()), q=x.q.double())


def same(found: Outputs, expected: Outputs) -> bool:
    """Whether two steps gave the same bits."""
    pairs = zip(found, expected, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
