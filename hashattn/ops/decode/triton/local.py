"""LocalTopK in two kernels: the nearest keys of each split of each chunk, then attention to the nearest of each chunk.

Neither needs to know how near the keys of other chunks are: there is no threshold to agree on, and no hint.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.device import capability, on, registers, starts_early
from hashattn.ops.decode.inputs import Before, Inputs, Outputs
from hashattn.ops.decode.kernels import Decode
from hashattn.ops.decode.sizes import ROWS, SPLIT, Sizes, carve, grid
from hashattn.ops.decode.triton.codes import RUN, distance, load_runs, program_row, span
from hashattn.ops.decode.triton.rows import combine, one_head, store_part


@triton.jit
def smallest(level, wanted, BITS: tl.constexpr):
    """Which entries of each row of level [R, n < 32768] are its `wanted` smallest, ties to the last, and their ranks
    in the order that they stand in. BITS: of a level."""
    cut = tl.zeros_like(wanted)  # in the end the largest that fewer than `wanted` lie below
    for i in tl.static_range(BITS):
        higher = cut + (1 << (BITS - 1 - i))
        below = tl.sum((level < higher[:, None]).to(tl.int32), 1)
        cut = tl.where(below < wanted, higher, cut)
    nearer, equal = level < cut[:, None], level == cut[:, None]
    hit = (equal.to(tl.int32) << 16) + nearer.to(tl.int32)
    total = tl.sum(hit, 1)
    dropped = ((total >> 16) + (total & 0xFFFF) - wanted)[:, None]  # of those at the cut, the first ones
    order = tl.cumsum(hit, 1)
    ties = order >> 16
    return nearer | (equal & (ties > dropped)), (order & 0xFFFF) + tl.maximum(ties - dropped, 0) - 1


@triton.jit
def place_of(column, chunk, chunks):
    """How many columns of a chunk come before a column."""
    stride = RUN * chunks
    return column // stride * RUN + tl.minimum(tl.maximum(column % stride - chunk * RUN, 0), RUN)


@triton.jit
def search_splits(
    query, codes, entries, starts, length, sinks, recents, limit, room, chunks, splits, kv_heads, T, G: tl.constexpr,
    WORDS: tl.constexpr, PLANES: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, KEEP: tl.constexpr,
    BITS: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks * splits, Hkv * G * T, B). Column n belongs to chunk n // RUN % chunks; a split is SPLIT columns of
    a chunk.

    Args:
        query: int64 [B, Hq, T, PLANES, WORDS].
        codes: int64 [B, Hkv, room, WORDS].
        entries: int32 [rows, chunks, splits, KEEP], written: level << 16 | place in the split, in the order of places,
            then -1. A level is a distance + 1, and 0 for forced keys.
        starts, length: int32 [B] and [1]; limit: columns that keys and codes have room for.
    """
    if PDL:
        gdc_wait()
    chunk, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row = program_row()
    kv = row // (G * T)
    first, end = span(starts, length, limit, kv // kv_heads, row % T, T, CAUSAL)
    low = split * SPLIT
    begin, stop = place_of(first, chunk, chunks) - low, place_of(end, chunk, chunks) - low
    wanted = tl.minimum(tl.maximum(tl.minimum(stop, SPLIT) - tl.maximum(begin, 0), 0), KEEP)
    own = entries + (row.to(tl.int64) * chunks * splits + tl.program_id(0)) * KEEP
    if wanted > 0:
        at = tl.arange(0, SPLIT)[None, :]
        columns = ((low + at) // RUN * chunks + chunk) * RUN + at % RUN
        x = load_runs(codes + kv.to(tl.int64) * room * WORDS, columns, room, WORDS)
        d = distance(x, query + row.to(tl.int64) * PLANES * WORDS, 0, WORDS, PLANES, 1, BIASED)
        head = place_of(first + sinks, chunk, chunks) - low
        tail = place_of(tl.maximum(end - recents, 0), chunk, chunks) - low
        level = tl.where((at < head) | (at >= tail), 0, d + 1)
        level = tl.where((at >= begin) & (at < stop), level, (1 << BITS) - 1)
        chosen, rank = smallest(level, wanted + tl.zeros([1], tl.int32), BITS)
        tl.store(own + rank, level << 16 | at, mask=chosen)
    slots = tl.arange(0, KEEP)
    tl.store(own + slots, -1, mask=slots >= wanted)
    if PDL:
        gdc_launch_dependents()


@triton.jit
def attend_chunks(
    q, keys, values, entries, starts, length, ids, parts, stats, arrived, out, lse, scale, limit, room, chunks,
    splits, kv_heads, T, G: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr,
    ENTRIES: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, CAUSAL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(chunks * KEEP / ROWS), Hkv * G * T, B).

    Args:
        q, keys, values: [B, Hq, T, DIM], [B, Hkv, room, DIM].
        ids: int32 [rows, chunks, KEEP], written: the columns of each chunk in ascending order, then -1.
        ENTRIES: of a chunk, at least splits * KEEP, a power of 2; KEEP where there is one split.
        parts, stats, arrived: scratch; arrived int32 [rows] is zero before and after.
        out, lse: [B, Hq, T, DIM] and float32 [B, Hq, T], written.
    """
    s = tl.program_id(0)
    row = program_row()
    slots = s * ROWS + tl.arange(0, ROWS)
    inside = slots < chunks * KEEP
    own_ids = ids + row.to(tl.int64) * chunks * KEEP
    if PDL:
        gdc_wait()
    chunk = s * (ROWS // KEEP) + tl.arange(0, ROWS // KEEP)[:, None]
    at = tl.arange(0, ENTRIES)[None, :]
    own = entries + (row.to(tl.int64) * chunks + chunk) * splits * KEEP
    entry = tl.load(own + at, mask=(chunk < chunks) & (at < splits * KEEP), other=-1)
    place = at // KEEP * SPLIT + (entry & 0xFFFF)
    column = tl.where(entry < 0, -1, (place // RUN * chunks + chunk) * RUN + place % RUN)
    if ENTRIES == KEEP:
        tl.store(own_ids + chunk * KEEP + at, column, mask=chunk < chunks)
    else:
        level = tl.where(entry < 0, (1 << BITS) - 1, entry >> 16)
        wanted = tl.minimum(tl.sum((entry >= 0).to(tl.int32), 1), KEEP)
        chosen, rank = smallest(level, wanted, BITS)
        tl.store(own_ids + chunk * KEEP + rank, column, mask=chosen)
        free = tl.arange(0, KEEP)[None, :]
        tl.store(own_ids + chunk * KEEP + free, -1, mask=(free >= wanted[:, None]) & (chunk < chunks))
    tl.debug_barrier()  # other threads stored the columns
    columns = tl.load(own_ids + slots, mask=inside, other=-1)
    kv = row // (G * T)
    k_at, v_at = keys + kv.to(tl.int64) * room * DIM, values + kv.to(tl.int64) * room * DIM
    peak, total, acc = one_head(q + row.to(tl.int64) * DIM, k_at, v_at, columns, columns >= 0, scale, DIM, WIDTH)
    programs = tl.num_programs(0)
    part = row.to(tl.int64) * programs
    store_part(parts, stats, part + s, peak, total, acc, WIDTH, 1, 1)
    tl.debug_barrier()
    if PDL:
        gdc_launch_dependents()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == programs - 1:
        tl.store(arrived + row, 0)
        first, end = span(starts, length, limit, kv // kv_heads, row % T, T, CAUSAL)
        combine(
            parts, stats, part, programs, end > first, tl.load(length) > limit, out, lse, row, T, DIM, WIDTH, 1, 1, 16
        )


def prepare(like: Inputs, scan_only: bool = False) -> Decode:
    """See :func:`hashattn.ops.decode.triton.decode.prepare`; the rule has chunks, a query head chooses for itself."""
    sizes, stored, device = Sizes.of(like), like.stored, like.q.device
    assert like.bounds is not None and like.workspace is not None
    rule, rows, tokens, dim = sizes.rule, sizes.rows, sizes.tokens, sizes.head_dim
    chunks, keep, split, splits = rule.chunks or 1, rule.per_chunk, SPLIT // sizes.words, sizes.splits
    width, shape = triton.next_power_of_2(dim), (sizes.batch, sizes.q_heads, tokens, chunks * keep)
    buffers, arrived = carve(like.workspace, sizes.triton), like.bounds[sizes.hints]
    entries, parts = buffers["entries"], (buffers["parts"], buffers["stats"])
    searches, attends = (grid(n, rows, sizes.batch) for n in (chunks * splits, triton.cdiv(chunks * keep, ROWS)))
    ends, last = (like.starts, stored.length), (chunks, splits, sizes.kv_heads, tokens)
    early = {"launch_pdl": True} if starts_early(device) else {}
    common = {"G": sizes.group, "KEEP": keep, "BITS": level_bits(sizes.words, sizes.planes), "SPLIT": split}
    common |= {"CAUSAL": like.causal, "PDL": bool(early), **early}
    search = {"WORDS": sizes.words, "PLANES": sizes.planes, "BIASED": rule.biased, "num_warps": 4, **common}
    attend = {"DIM": dim, "WIDTH": width, "ENTRIES": triton.next_power_of_2(splits * keep), "ROWS": ROWS, **common}
    attend |= attend_options(width, splits, capability(device))

    def step(q: Tensor, query: Tensor, scale: float, before: Before | None) -> Outputs:
        q = q.contiguous()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ids = q.new_empty(shape, dtype=torch.int32)
        with on(device):
            numbers = rule.sinks, rule.recents, sizes.limit, sizes.code_room
            search_splits[searches](query, stored.codes, entries, *ends, *numbers, *last, **search)
            if not scan_only:
                given, results = (q, stored.keys, stored.values, entries), (ids, *parts, arrived, out, lse)
                attend_chunks[attends](*given, *ends, *results, scale, sizes.limit, sizes.room, *last, **attend)
        return Outputs(out, lse, ids)

    return step


def level_bits(words: int, planes: int) -> int:
    """Bits of a level: forced, every distance, and what is not seen."""
    return (64 * words * (2**planes - 1) + 2).bit_length()


def attend_options(width: int, splits: int, capability: tuple[int, int]) -> dict[str, int]:
    """How the second kernel is compiled: for two warps unless their registers would not suffice."""
    warps = 2 if width <= 128 and splits <= 8 else 4 if splits <= 32 else 8
    return {"num_warps": warps, **registers(capability)}
