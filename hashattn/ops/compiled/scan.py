"""Distances of codes to a query, and the exact choice of the nearest."""

from __future__ import annotations

from typing import Any

import numpy as np

from hashattn.ops.compiled.jit import (
    add_distances_1,
    add_distances_2,
    add_distances_4,
    at_most,
    inlined,
    lowest_bit,
    nearer_bytes,
    popcount,
)

BLOCK = 1024  # keys whose distances are summed at a time
LEVELS = 254  # distances told apart at a time: bytes, of which 255 is farther
U1 = np.uint64(1)


@inlined
def sum_block(
    codes: Any, words: int, first: int, count: int, query: Any, row: int, weight: int, sums: Any, more: bool
) -> None:
    """Weighted distances of `count` keys from `first` on to one plane of a query: put into sums, or added."""
    at = np.int64(0)
    heavy = np.uint16(weight)
    if words == 1:
        while at + 16 <= count:
            add_distances_1(codes, first + at, query, row, heavy, sums, at, more)
            at += 16
    elif words == 2:
        while at + 8 <= count:
            add_distances_2(codes, first + at, query, row, heavy, sums, at, more)
            at += 8
    elif words == 4:
        while at + 4 <= count:
            add_distances_4(codes, first + at, query, row, heavy, sums, at, more)
            at += 4
    while at < count:
        far = np.uint64(0)
        for w in range(words):
            far += popcount(query[row * words + w] ^ codes[(first + at) * words + w])
        sums[at] = np.uint16(weight * far + (np.uint64(sums[at]) if more else np.uint64(0)))
        at += 1


@inlined
def scan(
    codes: Any,
    words: int,
    low: int,
    high: int,
    query: Any,
    rows: int,
    planes: int,
    biased: bool,
    base: int,
    sums: Any,
    near: Any,
) -> None:
    """Distances of the keys from low to high less `base`, within a byte, to near; and 255 to the next 64 bytes.

    Rows of the query are `planes` of each head, whose sum it is.
    """
    for block in range(low, high, BLOCK):
        count = min(BLOCK, high - block)
        for row in range(rows):
            sum_block(codes, words, block, count, query, row, 1 << (row % planes), sums, row > 0)
        if biased:  # the last byte is no part of the code, where the query has zeros
            for i in range(count):
                own = codes[(block + i) * words + words - 1] >> np.uint64(56)
                sums[i] = np.uint16(np.int64(sums[i]) + rows * (np.int64(own) - np.int64(popcount(own))))
        for i in range(0, count, 16):
            nearer_bytes(sums, i, np.uint16(base), near, block - low + i)
    near[high - low : high - low + 64] = np.uint8(255)


@inlined
def count_near(near: Any, padded: int, most: int, stride: int) -> int:
    """How many bytes are at most `most`, looking at 64 of every `stride`."""
    if most < 0:
        return 0
    total, at, limit = np.int64(0), np.int64(0), np.uint8(most)
    while at < padded:
        total += np.int64(popcount(at_most(near, at, limit)))
        at += stride
    return total


@inlined
def threshold(near: Any, padded: int, k: int, top: int) -> int:
    """The smallest byte that at least k are not above, where `top` is one that at least k are not above."""
    low, high = np.int64(-1), np.int64(top)
    if padded >= 16384:  # a sample says about where
        stride = 1024
        want = k * 64 // stride
        slack = 3 * np.int64(np.sqrt(want + 1.0)) + 1
        for side in range(2):
            under, over = np.int64(-1), high
            target = want - slack if side == 0 else want + slack
            while over - under > 1:
                middle = (under + over) >> 1
                if count_near(near, padded, middle, stride) >= target:
                    over = middle
                else:
                    under = middle
            guess = over - 1 if side == 0 else over
            if guess > low and guess < high:
                if count_near(near, padded, guess, 64) >= k:
                    high = guess
                else:
                    low = guess
    while high - low > 1:
        middle = (low + high) >> 1
        if count_near(near, padded, middle, 64) >= k:
            high = middle
        else:
            low = middle
    return high


@inlined
def emit(ids: Any, at: int, chosen: np.uint64, base: int) -> int:
    """Append base + the numbers of the set bits, four at a time without asking: up to three places too many."""
    count, done = np.int64(popcount(chosen)), np.int64(0)
    while done < count:
        for j in range(4):
            ids[at + done + j] = np.int32(base + np.int64(lowest_bit(chosen)))
            chosen &= chosen - U1
        done += 4
    return at + count


@inlined
def limits(near: Any, padded: int, k: int, top: int) -> tuple[int, int]:
    """Where the k nearest of those that are not above `top` end: the farthest byte, and its first place that is kept.

    Before that place bytes as far are dropped: ties go to the last. (-1, 0) for none.
    """
    if k <= 0:
        return np.int64(-1), np.int64(0)
    most = threshold(near, padded, k, top)
    drop, place = count_near(near, padded, most, 64) - k, np.int64(0)
    while drop > 0:
        ties = at_most(near, place, np.uint8(most)) & ~nearer(near, place, most)
        count = np.int64(popcount(ties))
        if count > drop:
            for _ in range(drop):
                ties &= ties - U1
            return most, place + np.int64(lowest_bit(ties))
        drop -= count
        place += 64
    return most, place


@inlined
def nearer(near: Any, place: int, most: int) -> np.uint64:
    """Of 64 bytes: those below `most`."""
    return at_most(near, place, np.uint8(most - 1)) if most > 0 else np.uint64(0)


@inlined
def kept(near: Any, place: int, most: int, cut: int) -> np.uint64:
    """Of 64 bytes: those within limits()."""
    if place >= cut:
        return at_most(near, place, np.uint8(most)) if most >= 0 else np.uint64(0)
    closer = nearer(near, place, most)
    if place + 64 <= cut:
        return closer
    return closer | (at_most(near, place, np.uint8(most)) & ~((U1 << np.uint64(cut - place)) - U1))


@inlined
def nearest(near: Any, padded: int, k: int, top: int, base: int, ids: Any, at: int) -> int:
    """Append the k nearest of those that are not above `top`, ties to the last, in ascending order."""
    most, cut = limits(near, padded, k, top)
    for place in range(0, padded, 64):
        at = emit(ids, at, kept(near, place, most, cut), base + place)
    return at


@inlined
def nearest_two(
    near: Any, padded: int, few: int, k: int, top: int, base: int, ids: Any, at: int, others: Any
) -> tuple[int, int]:
    """The same for the few nearest, and to `others` the rest of the k nearest. Returns where both end."""
    most, cut = limits(near, padded, few, top)
    farther, later = limits(near, padded, k, top)
    end = np.int64(0)
    for place in range(0, padded, 64):
        first = kept(near, place, most, cut)
        at = emit(ids, at, first, base + place)
        end = emit(others, end, kept(near, place, farther, later) & ~first, base + place)
    return at, end
