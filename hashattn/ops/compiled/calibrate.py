"""Calibrated distances: votes of a layer's heads, the weights of the layer before, and what both take off."""

from __future__ import annotations

from typing import Any

import numpy as np

from hashattn.ops.compiled.jit import exactly, inlined, shifted, tally


@inlined
def vote(near: Any, count: int, most: int, cut: int, votes: Any) -> None:
    """One vote more for each of `count` keys that a choice keeps, within limits()."""
    for place in range(0, count, 64):
        if place + 64 <= cut:
            if most > 0:
                tally(near, place, np.uint8(most - 1), votes)
        elif place >= cut:
            if most >= 0:
                tally(near, place, np.uint8(most), votes)
        else:
            for i in range(place, place + 64):
                votes[i] += np.uint8(np.int64(near[i]) < most + (i >= cut))


@exactly
def gather_prior(ids: Any, weights: Any, group: int, low: int, prior: Any) -> None:
    """Add the weights that a head gave the keys at ids, int32 [K], to their priors, of columns from `low` on.

    weights: float32 [group, K], of the heads that share these ids: their mean counts.
    """
    room = np.uint64(len(prior))
    if group == 1:
        for n in range(len(ids)):
            at = np.uint64(np.int64(ids[n]) - low)  # of empty slots, and of what is forced, far beyond
            if at < room:
                prior[at] += weights[0, n]
        return
    for n in range(len(ids)):
        at = np.uint64(np.int64(ids[n]) - low)
        if at < room:
            total = np.float32(0)
            for g in range(group):
                total += weights[g, n]
            prior[at] += total / np.float32(group)


@exactly
def mark_prior(prior: Any, heads: int, visible: int, ratio: float, near: int, far: int, more: Any) -> None:
    """What each key's distance is raised by: `near` where its prior is above the ratio, `far` where it is not."""
    every, seen, least = np.float32(heads), np.float32(visible), np.float32(ratio)
    for i in range(len(prior)):
        more[i] = np.uint8(near) if prior[i] / every * seen > least else np.uint8(far)


@inlined
def add_votes(votes: Any, count: int, needed: int, near: int, far: int, more: Any) -> None:
    """The same of votes, added."""
    enough, more_near, more_far = np.uint8(needed), np.uint8(near), np.uint8(far)
    for i in range(np.uint64(count)):
        more[i] = np.uint8(more[i] + (more_near if votes[i] >= enough else more_far))


@inlined
def calibrate(near: Any, padded: int, more: Any, less: int, to: Any) -> None:
    """Distances raised by what each key has more, within a byte: exact up to 254 less the most that any has more."""
    for place in range(0, padded, 64):
        shifted(near, place, more, np.uint8(less), to)
