"""Inputs that are not finite, and the comparison with the reference, for tests on CPU and GPU: NaN in, NaN out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hashattn.ops.decode import Inputs, Rule, reference
from tests.ops.decode.cases import inputs, moved, norms_of, ready

RULES = [Rule(k=100), Rule(share=0.5, shared=True), Rule(k=64, chunks=4)]
TIERS = [Rule(share=0.5, critical=0.2), Rule(share=0.5, critical=0.2, shared=True)]
SOUND = 0  # the sequence that is left as it is


def spoil(x: Inputs, kept: list[int], skipped: list[int]) -> None:
    """Break each sequence but the first in a way of its own.

    Args:
        kept, skipped: a column of each that the first query head keeps, and one that no head keeps.
    """
    x.q[1, 0, 0, 5] = torch.nan
    x.q[2, 1, 0, 7] = torch.inf
    x.stored.keys[3, 0, kept[3], 3] = torch.nan
    x.stored.keys[4, 0, kept[4], 3] = torch.inf
    x.stored.values[5, 0, kept[5], 9] = torch.nan
    x.stored.keys[6, 0, skipped[6]], x.stored.values[6, 0, skipped[6]] = torch.nan, torch.inf
    x.stored.keys[7, ..., 4] = x.stored.keys[7, ..., 4].abs() + 1  # so that all logits are minus infinity:
    x.q[7, 0, 0, 4] = -torch.inf


def breaks_as_the_reference_does(
    decode: Any, rule: Rule, *, dtype: torch.dtype, device: str = "cpu", scale: float = 0.125
) -> None:
    """The same keys, NaN and infinities where the reference has them, and its numbers elsewhere."""
    x = replace(moved(inputs(11, batch=8, group=2, filled=200, room=208, dtype=dtype), device), rule=rule, scale=scale)
    estimate = norms_of(x, 60) if rule.critical is not None else None
    chosen = reference(replace(x, estimate=estimate)).ids.flatten(1, 2).tolist()
    kept = [next(n for n in heads[0] if n >= 0) for heads in chosen]
    skipped = [min(set(range(200)) - {n for head in heads for n in head}) for heads in chosen]
    spoil(x, kept, skipped)
    if estimate is not None:
        estimate = replace(estimate, norms=norms_of(x, 60).norms)
    x = ready(x, rule, estimate=estimate)
    exact, found = reference(x), decode(x)
    slots = exact.ids.shape[-1]
    assert torch.equal(found.ids[..., :slots], exact.ids)
    assert estimate is None or torch.equal(found.tier[..., :slots], exact.tier)
    for own, expected in zip(found[:2], exact[:2], strict=True):
        assert torch.equal(own.isnan(), expected.isnan())
        assert torch.equal(own.isinf(), expected.isinf())
        finite = expected.isfinite()
        size, spacing = expected[finite].abs().sum(), torch.finfo(own.dtype).eps
        largest = expected[finite].abs().max() if size > 0 else 0
        assert ((own - expected)[finite].abs() <= 3 * spacing * largest + 1e-5 * largest).all()
    if abs(scale) < torch.inf:
        assert exact[0][[SOUND, 6]].isfinite().all()
        assert exact[0][1, 0].isnan().all() and exact[0][1, 1].isfinite().all() and exact[0][3, 0].isnan().all()
        assert rule.critical is not None or exact[0][7, 0].isnan().all()
