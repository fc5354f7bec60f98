"""The keys that a choice keeps: of those that its query sees, the nearest by distances that may be calibrated."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hashattn.ops.compiled import places as p
from hashattn.ops.compiled.calibrate import calibrate
from hashattn.ops.compiled.jit import inlined
from hashattn.ops.compiled.places import Work
from hashattn.ops.compiled.scan import LEVELS, count_near, nearest, nearest_two, scan


class Seen(NamedTuple):
    """Columns that a query sees: how many, how many of them are forced at either end, and where the others lie."""

    visible: int
    sinks: int
    recents: int
    low: int
    high: int


@inlined
def seen(at: Any, start: int, token: int) -> Seen:
    """What a row's query sees from `start` on."""
    end = at[p.LENGTH] - (at[p.TOKENS] - 1 - token if at[p.CAUSAL] else 0)
    visible = max(0, end - start)
    sinks = min(at[p.SINKS], visible)
    recents = min(at[p.RECENTS], visible - sinks)
    return Seen(visible, sinks, recents, start + sinks, start + visible - recents)


@inlined
def wanted(at: Any, k: int, share: float, own: Seen) -> int:
    """Keys wanted beyond the forced ones."""
    forced = own.sinks + own.recents
    return max(0, budget(k, share, own.visible, forced + at[p.MIN_K]) - forced)


@inlined
def choose(
    at: Any, shares: Any, codes: Any, query: Any, rows: int, own: Seen, base: int, guess: int, more: Any, work: Work
) -> tuple[int, int, int]:
    """The keys that a query, or a group's queries, keep of those they see: to work.ids, critical ones first.

    Args:
        base: of the distances that work.near holds; -1 for none.
        guess: where to begin then.
        more: what distances are raised by, see `spread`.

    Returns:
        how many, how many of them are critical, and the base of their distances, a good guess for the next step.
    """
    sinks, low, high = own.sinks, own.low, own.high
    count = wanted(at, at[p.K], shares[p.SHARE], own)
    for i in range(sinks):
        work.ids[i] = np.int32(low - sinks + i)
    few = count
    if at[p.TIERED]:
        few = min(count, wanted(at, -1, shares[p.CRITICAL_SHARE], own))
    place, padded, most = np.int64(sinks), (high - low + 63) // 64 * 64, spread(at)
    both = few < count
    if both and few > 0:  # most often one range of distances holds the ends of both
        base, top, within = look(
            at, codes, query, rows, low, high, count, base, guess, more, most, work.sums, work.near
        )
        if base == 0 or count_near(work.near, padded, 0, 64) < few:
            few, count = min(few, within), min(count, within)
            place, rest = nearest_two(work.near, padded, few, count, top, low, work.ids, place, work.nearer)
            critical = append_recents(own, place, work)
            for i in range(rest):
                work.ids[critical + i] = work.nearer[i]
            return critical + rest, critical, base
    if few > 0:
        base, top, within = look(at, codes, query, rows, low, high, few, base, guess, more, most, work.sums, work.near)
        few = min(few, within)
        place = nearest(work.near, padded, few, top, low, work.ids, place)
    place = critical = append_recents(own, place, work)
    found = base
    if both:
        base, top, within = look(
            at, codes, query, rows, low, high, count, base, guess, more, most, work.sums, work.near
        )
        rest, n = nearest(work.near, padded, min(count, within), top, low, work.nearer, 0), np.int64(sinks)
        for i in range(rest):  # both ascend
            one = work.nearer[i]
            if n < sinks + few and work.ids[n] == one:
                n += 1
            else:
                work.ids[place] = one
                place += 1
    return place, critical, found


@inlined
def append_recents(own: Seen, place: int, work: Work) -> int:
    """The keys that are kept as the last ones, to work.ids. Returns where they end."""
    for i in range(own.recents):
        work.ids[place + i] = np.int32(own.high + i)
    return place + own.recents


@inlined
def spread(at: Any) -> int:
    """The most that a distance is raised by: calibrated ones are no lower than raw ones, which ranks them alike."""
    return abs(at[p.VOTE]) + abs(at[p.PRIOR])


@inlined
def look(
    at: Any,
    codes: Any,
    query: Any,
    rows: int,
    low: int,
    high: int,
    count: int,
    base: int,
    guess: int,
    more: Any,
    most: int,
    sums: Any,
    near: Any,
) -> tuple[int, int, int]:
    """Distances above `base`, as bytes, in a range where the `count` nearest keys end: from what `near` holds on.

    Args:
        base: of the raw distances in what it holds; -1 for nothing, and then a guess where to begin.
        more, most: uint8 [high - low], what each distance is raised by, and the most that any is.

    Returns:
        the base, the farthest byte that may be chosen, and how many keys are no farther: fewer only within a radius.
    """
    radius, padded, held, levels = at[p.RADIUS], (high - low + 63) // 64 * 64, base >= 0, LEVELS - most
    if radius >= 0 and most > 0:
        radius += max(at[p.VOTE], 0) + max(at[p.PRIOR], 0)
    base = max(base, guess if radius < 0 else 0)
    while True:
        lift = most if base > 0 else 0  # bytes begin where every key at the base ends
        if not held:
            scan(codes, at[p.WORDS], low, high, query, rows, at[p.PLANES], at[p.BIASED] > 0, base, sums, near)
            if most > 0:
                calibrate(near, padded, more, lift, near)
        if base > 0 and count_near(near, padded, 0, 64) >= count:  # they end at or before the base
            base = max(0, base - (levels - most))
            held = False
            continue
        top = levels if radius < 0 else min(levels, radius - base - lift)
        within = count_near(near, padded, top, 64)
        if within >= count or top < levels:
            return base, top, within
        base += levels - most
        held = False


@inlined
def budget(k: int, share: float, visible: int, least: int) -> int:
    """As Budget.count."""
    count = k if k >= 0 else np.int64(np.ceil(share * np.float64(visible)))
    return min(visible, max(count, least))
