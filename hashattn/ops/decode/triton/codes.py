"""Device functions on packed codes: distances, which columns a query sees, lists of the keys near it.

Codes are read in runs of 8 neighbouring columns. A program serves up to four lanes, the heads of a group that choose
for themselves, so that the 8 * 4 flags of a run fill an int32 and four counts an int64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FAR = tl.constexpr(1 << 14)  # beyond every distance; distances and it fit 15 bits
LANE = tl.constexpr(0xFFFF)
RUN = tl.constexpr(8)
VOTE = tl.constexpr(48)  # bits of a mark below its votes
WEIGHT = tl.constexpr((1 << 48) - 1)  # these bits
UNITS = tl.constexpr(2.0**38)  # of a weight of one, in them: the weights of 512 heads fit
PER_UNIT = tl.constexpr(2.0**-38)


@triton.jit
def popcount(x):
    """Set bits of int32 or int64, as int32."""
    if INTERPRETED:
        if x.dtype == tl.int32:
            x = x.to(tl.int64) & 0xFFFFFFFF
        x = x - ((x >> 1) & 0x5555555555555555)
        x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
        return ((x * 0x0101010101010101) >> 56).to(tl.int32)
    else:
        return libdevice.popc(x)


@triton.jit
def load_runs(codes, columns, room, WORDS: tl.constexpr):
    """Codes of columns [RUNS, RUN]: a tuple of WORDS tensors int64 of that shape."""
    x = ()
    for w in tl.static_range(WORDS):
        x += (tl.load(codes + columns * WORDS + w, mask=columns < room, other=0),)
    return x


@triton.jit
def distance(
    x, query, step, WORDS: tl.constexpr, PLANES: tl.constexpr, SUM: tl.constexpr, BIASED: tl.constexpr = False
):
    """Distances of loaded codes to a query of PLANES bit planes, or summed to SUM queries `step` words apart: int32.

    BIASED: the last byte of a code is a number to add, for each query.
    """
    total = tl.zeros(x[0].shape, tl.int32)
    if BIASED:
        byte = (x[WORDS - 1] >> 56).to(tl.int32) & 0xFF
        total += SUM * (byte - popcount(byte))  # the loop counts its bits: the queries' last byte is zero
    for g in tl.static_range(SUM):
        for p in tl.static_range(PLANES):
            for w in tl.static_range(WORDS):
                total += popcount(x[w] ^ tl.load(query + g * step + p * WORDS + w)) << p
    return total


@triton.jit
def program_row():
    """The row of a program of a grid from :func:`hashattn.ops.decode.sizes.grid`."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def span(starts, length, room, b, t, T, CAUSAL: tl.constexpr):
    """The columns (first, end) that query t of row b sees, none of them beyond the room."""
    first = tl.load(starts + b)
    end = tl.minimum(tl.load(length), room)
    if CAUSAL:
        end = end - (T - 1) + t
    return first, tl.maximum(end, first)


@triton.jit
def offsets(columns, first, end, sinks, recents):
    """Added to distances: -FAR ranks forced keys before every distance, FAR keeps unseen ones from being candidates."""
    forced = (columns < first + sinks) | (columns >= end - recents)
    seen = (columns >= first) & (columns < end)
    return tl.where(seen, tl.where(forced, -FAR, 0), FAR)


@triton.jit
def read_bound(bound):
    """A bound, kept in sixteenths, in distances: never so large that unseen keys could be candidates."""
    return tl.minimum(tl.maximum(tl.load(bound) >> 4, 0), FAR - 1)


@triton.jit
def discount(columns, mask, marks, visible, votes, agreement, ratio, prior):
    """What brings marked keys nearer, int32, of the shape of columns; see Agreement and Prior.

    Args:
        marks: int64 [room]: votes << VOTE, plus the weight that the layer before gave the key.
        visible: keys that the query sees.
        votes: that are enough for `agreement`, the discount of a choice.
        ratio: of the uniform share, 1 / visible, times the layer's query heads: more weight is enough for `prior`.
    """
    mark = tl.load(marks + columns, mask=mask, other=0)
    weight = (mark & WEIGHT).to(tl.float32) * PER_UNIT
    near = tl.where((mark >> VOTE) >= votes, agreement, 0)
    return near + tl.where(weight * visible.to(tl.float32) > ratio, prior, 0)


@triton.jit
def list_near(
    x, shift, places, taken, lists, stride, query, step, bounds, apart, LANES: tl.constexpr, SUM: tl.constexpr,
    WORDS: tl.constexpr, PLANES: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Append the keys within each lane's bound to its list, in order. Returns the lengths, 16 bits a lane: int64.

    Args:
        x: from load_runs.
        shift: int32 [RUNS, RUN], added to distances.
        places: int32 [RUNS, RUN], what the lists name the keys.
        taken: lengths so far.
        lists: of the first lane: int32, (bound - distance) << 16 | place; the next lane's is `stride` further.
        query: of the first lane; the next lane's is SUM * step words further.
        bounds: of the first lane; the next lane's is `apart` further.
    """
    shorts = ()  # distance - bound - 1 of each lane: negative within the bound
    flags = tl.zeros(shift.shape, tl.int32)
    for i in tl.static_range(LANES):
        past = read_bound(bounds + i * apart) + 1
        short = distance(x, query + i * SUM * step, step, WORDS, PLANES, SUM, BIASED) + (shift - past)
        flags += (short.to(tl.uint32, bitcast=True) >> 31).to(tl.int32, bitcast=True) << i
        shorts += (short,)
    nibble = 4 * tl.arange(0, 8)[None, :]
    flags = tl.sum(flags << nibble, 1)  # a run's, bit 4 * place + lane
    upto = ()  # nibble j: flags of the run up to key j
    count = tl.zeros(flags.shape, tl.int64)
    for i in tl.static_range(LANES):
        upto += (((flags >> i) & 0x11111111) * 0x11111111,)
        count += ((upto[i] >> 28) & 15).to(tl.int64) << (16 * i)
    before = tl.cumsum(count, 0) - count + taken
    for i in tl.static_range(LANES):
        first = ((before >> (16 * i)) & LANE).to(tl.int32) - 1
        to = first[:, None] + ((upto[i][:, None] >> nibble) & 15)
        if WORDS == 1:  # the layout that the codes were loaded in; the mask keeps single stores
            to = tl.multiple_of(tl.max_contiguous(to, [1, 2]), [1, 2])
        tl.store(lists + i * stride + to, (~shorts[i] << 16) | places, mask=shorts[i] < 0)
    return taken + tl.sum(count, 0)
