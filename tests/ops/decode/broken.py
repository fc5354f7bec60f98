"""Inputs that are not finite, and the comparison with the reference, for tests on CPU and GPU: NaN in, NaN out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hashattn.ops.decode import Rule, reference, reference_tiers
from tests.ops.decode.cases import Inputs, inputs, norms_of

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
    x.keys[3, 0, kept[3], 3] = torch.nan
    x.keys[4, 0, kept[4], 3] = torch.inf
    x.values[5, 0, kept[5], 9] = torch.nan
    x.keys[6, 0, skipped[6]], x.values[6, 0, skipped[6]] = torch.nan, torch.inf
    x.keys[7, ..., 4] = x.keys[7, ..., 4].abs() + 1  # so that all logits are minus infinity:
    x.q[7, 0, 0, 4] = -torch.inf


def breaks_as_the_reference_does(
    decode: Any, rule: Rule, *, dtype: torch.dtype, device: str = "cpu", scale: float = 0.125
) -> None:
    """The same keys, NaN and infinities where the reference has them, and its numbers elsewhere."""
    x = inputs(11, batch=8, group=2, filled=200, room=208, dtype=dtype).to(device)
    specified, estimate = (reference, ()) if rule.critical is None else (reference_tiers, (norms_of(x, 60),))
    chosen = specified(*x.all, *estimate, rule, scale=scale)[2].flatten(1, 2).tolist()
    kept = [next(n for n in heads[0] if n >= 0) for heads in chosen]
    skipped = [min(set(range(200)) - {n for head in heads for n in head}) for heads in chosen]
    spoil(x, kept, skipped)
    if estimate:
        estimate = (replace(estimate[0], norms=norms_of(x, 60).norms),)
    bounds, workspace = x.state(rule)
    exact = specified(*x.all, *estimate, rule, scale=scale)
    found = decode(*x.all, bounds, *estimate, rule, workspace, scale=scale)
    for own, expected in zip(found[2:], exact[2:], strict=True):
        assert torch.equal(own[..., : expected.shape[-1]], expected)
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
