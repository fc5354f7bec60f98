"""Device functions on gathered rows: attention of a tile of keys, and the last program's combination of the parts."""

from __future__ import annotations

import triton
import triton.language as tl

from hashattn.ops.decode.triton.codes import distance

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(storage, columns, filled, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of width DIM (padded to WIDTH) at columns: [ROWS, WIDTH]."""
    dims = tl.arange(0, WIDTH)
    at = columns.to(tl.int64)[:, None] * DIM + dims[None, :]
    mask = filled[:, None] if WIDTH == DIM else filled[:, None] & (dims < DIM)[None, :]
    return tl.load(storage + at, mask=mask, other=0.0)


@triton.jit
def estimate(
    q, step, centre, a, norms, codes, query, words_step, columns, medium, per_bit, G: tl.constexpr,
    PADDED: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Estimated q.k of G queries and the medium keys at columns: float32 [PADDED, ROWS]; see Estimate.

    Args:
        step, words_step: from a query to the next one, of q and of its signs at query.
        per_bit: 2 / bits.
    """
    dims, heads = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    rows = tl.load(
        q + heads[:, None] * step + dims[None, :], mask=(heads < G)[:, None] & (dims < DIM)[None, :], other=0.0
    ).to(tl.float32)
    offset = tl.sum(rows * tl.load(centre + dims, mask=dims < DIM, other=0.0)[None, :], 1)
    size = tl.sqrt(tl.sum(rows * rows, 1)) * tl.load(a).to(tl.float32)
    norm = tl.load(norms + columns, mask=medium, other=0.0).to(tl.float32)
    x = ()
    for w in tl.static_range(WORDS):
        x += (tl.load(codes + columns.to(tl.int64) * WORDS + w, mask=medium, other=0),)
    differing = tl.zeros([PADDED, columns.shape[0]], tl.int32)
    for g in tl.static_range(G):
        own = distance(x, query + g * words_step, 0, WORDS, 1, 1)
        differing += tl.where((heads == g)[:, None], own[None, :], 0)
    return offset[:, None] + size[:, None] * norm[None, :] * (1.0 - per_bit * differing.to(tl.float32))


@triton.jit
def one_head(
    q, keys, values, columns, filled, scale, DIM: tl.constexpr, WIDTH: tl.constexpr, exact=None, estimated=None,
    logits=None,
):  # fmt: skip
    """A query's attention to a tile of keys, not yet divided: (peak [1], total [1], sum [WIDTH]), float32, base 2.

    Keys that are filled and not exact are not read: theirs is the estimated q.k. A maximum passes NaN over, which is
    then in the total. Logits in base 2 are written to where they are wanted, float32 [ROWS].
    """
    dims = tl.arange(0, WIDTH)
    k = load_rows(keys, columns, filled if exact is None else exact, DIM, WIDTH)
    v = load_rows(values, columns, filled, DIM, WIDTH)
    row = tl.load(q + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    x = tl.sum(k.to(tl.float32) * row[None, :], 1)
    if estimated is not None:
        x = tl.where(exact, x, estimated)
    x = tl.where(filled, x * (scale * LOG2E), float("-inf"))
    if logits is not None:
        tl.store(logits + tl.arange(0, columns.shape[0]), x)
    peak = tl.max(x, 0)
    p = tl.exp2(x - tl.where(peak == float("-inf"), 0.0, peak))
    one = tl.zeros([1], tl.float32)
    return one + peak, one + tl.sum(p, 0), tl.sum(p[:, None] * v.to(tl.float32), 0)[None, :]


@triton.jit
def group_of_heads(
    q, step, keys, values, columns, filled, scale, G: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, exact=None, estimated=None, logits=None, apart=0,
):  # fmt: skip
    """The same for G queries that share the keys, `step` elements apart: ([PADDED], [PADDED], [PADDED, WIDTH]).

    Their logits are `apart` elements apart.
    """
    dims, heads = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    k = load_rows(keys, columns, filled if exact is None else exact, DIM, WIDTH)
    v = load_rows(values, columns, filled, DIM, WIDTH)
    rows = tl.load(
        q + heads[:, None] * step + dims[None, :], mask=(heads < G)[:, None] & (dims < DIM)[None, :], other=0.0
    )
    x = tl.dot(rows, tl.trans(k), input_precision="ieee")
    if estimated is not None:
        x = tl.where(exact[None, :], x, estimated)
    x = tl.where(filled[None, :], x * (scale * LOG2E), float("-inf"))
    if logits is not None:
        at = heads[:, None].to(tl.int64) * apart + tl.arange(0, columns.shape[0])[None, :]
        tl.store(logits + at, x, mask=(heads < G)[:, None])
    peak = tl.max(x, 1)
    p = tl.exp2(x - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    return peak, tl.sum(p, 1), tl.dot(p.to(v.dtype), v, input_precision="ieee")


@triton.jit
def store_part(parts, stats, at, peak, total, out, WIDTH: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """Keep one program's part: parts float32 [..., HEADS, WIDTH], stats float32 [..., HEADS, 2]."""
    dims, heads = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    at = at.to(tl.int64)
    tl.store(parts + (at * HEADS + heads[:, None]) * WIDTH + dims[None, :], out, mask=(heads < HEADS)[:, None])
    tl.store(stats + (at * HEADS + heads) * 2, peak, mask=heads < HEADS)
    tl.store(stats + (at * HEADS + heads) * 2 + 1, total, mask=heads < HEADS)


@triton.jit
def combine(
    parts, stats, first, n, kept, spoilt, out, lse, row0, T, DIM: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Join parts first to first + n of HEADS heads, and write their rows of out and lse (natural logarithm).

    Returns the peak and the total of each head, float32 [PADDED] in base 2. Head g's row is row0 + g * T. A spoilt
    result is NaN, and so is one of keys that were kept whose logits are all -infinity; without any it is zero.
    """
    dims, heads, pieces = tl.arange(0, WIDTH), tl.arange(0, PADDED), tl.arange(0, TILE)
    first = first.to(tl.int64)
    peak = tl.full([PADDED], float("-inf"), tl.float32)
    for i in range(0, n, TILE):
        mask = (i + pieces < n)[:, None] & (heads < HEADS)[None, :]
        one = ((first + i + pieces) * HEADS)[:, None] + heads[None, :]
        peak = tl.maximum(peak, tl.max(tl.load(stats + one * 2, mask=mask, other=float("-inf")), 0))
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, WIDTH], tl.float32)
    for i in range(0, n, TILE):
        mask = (i + pieces < n)[:, None] & (heads < HEADS)[None, :]
        one = ((first + i + pieces) * HEADS)[:, None] + heads[None, :]
        weight = tl.exp2(tl.load(stats + one * 2, mask=mask, other=float("-inf")) - peak[None, :])
        total += tl.sum(weight * tl.load(stats + one * 2 + 1, mask=mask, other=0.0), 0)
        own = tl.load(parts + one[:, :, None] * WIDTH + dims[None, None, :], mask=mask[:, :, None], other=0.0)
        acc += tl.sum(own * weight[:, :, None], 0)
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    result = tl.where(spoilt | kept & (total == 0)[:, None], float("nan"), result)
    row = row0.to(tl.int64) + heads * T
    mask = (heads < HEADS)[:, None] & (dims < DIM)[None, :]
    tl.store(out + row[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty), mask=mask)
    logarithm = tl.where(kept & (total == 0), float("nan"), (peak + tl.log2(total)) / LOG2E)
    tl.store(lse + row, logarithm, mask=heads < HEADS)
    return peak, total


@triton.jit
def to_weights(
    logits, apart, n, peak, total, kept, HEADS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Turn n logits in base 2 of each of HEADS heads, `apart` elements apart, into softmax weights, in place."""
    heads, slots = tl.arange(0, PADDED), tl.arange(0, TILE)
    part = tl.where(kept & (total == 0), float("nan"), 1.0 / tl.where(total == 0, 1.0, total))
    for i in range(0, n, TILE):
        at = heads[:, None].to(tl.int64) * apart + (i + slots)[None, :]
        mask = (heads < HEADS)[:, None] & (i + slots < n)[None, :]
        x = tl.load(logits + at, mask=mask, other=float("-inf"))
        tl.store(logits + at, tl.exp2(x - peak[:, None]) * part[:, None], mask=mask)
