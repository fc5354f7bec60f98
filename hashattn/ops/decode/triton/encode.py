"""Encodes the newest queries and keys and appends what belongs to the keys: one kernel, two where there is an MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.device import check_nvidia, on, starts_early
from hashattn.ops.decode.inputs import Newest, Placed
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.sizes import carve, layer_parts
from hashattn.ops.decode.triton.append import lengthen, load_rows, place, store_rows
from hashattn.ops.decode.triton.matrix import load_block, load_columns, load_vectors, relu, times
from hashattn.ops.decode.triton.mlp import run_layers


@triton.jit
def load_weights(
    linear, last, bias, word, DIM: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, BITS: tl.constexpr
):
    """The 64 columns of a word: of the linear map and, with HIDDEN, of the MLP's last layer and its bias."""
    weights = (load_block(linear, 0, 64 * word, DIM, BITS, PADDED, 64),)
    if HIDDEN:
        weights += (load_block(last, 0, 64 * word, HIDDEN, BITS, triton.next_power_of_2(HIDDEN), 64),)
        weights += (load_columns(bias, 64 * word, BITS, 64),)
    return weights


@triton.jit
def load_hidden(sums, rows, count, HIDDEN: tl.constexpr, PARTS: tl.constexpr):
    """The last hidden layer of these rows from its parts [PARTS, count, HIDDEN]: [vectors, units], or None."""
    h = None
    if HIDDEN:
        row, units = rows[:, None].to(tl.int64), tl.arange(0, triton.next_power_of_2(HIDDEN))[None, :]
        inside = (row < count) & (units < HIDDEN)
        h = tl.zeros(inside.shape, tl.float32)
        for part in tl.static_range(PARTS):
            h += tl.load(sums + (row + part * count) * HIDDEN + units, mask=inside, other=0.0)
        h = relu(h)
    return h


@triton.jit
def project(x, h, weights, HIDDEN: tl.constexpr):
    """What 64 signs are taken of: [vectors, 64]."""
    p = times(x, weights[0])
    if HIDDEN:
        p += times(h, weights[1]) + weights[2]
    return p


@triton.jit
def level_of(p, largest, PLANES: tl.constexpr):
    """Which of 2^PLANES levels, symmetric about zero, each value lies in."""
    HALF: tl.constexpr = 1 << (PLANES - 1)
    steps = tl.div_rn(tl.abs(p), tl.broadcast_to(largest, p.shape)) * HALF
    steps = tl.where(steps >= 1, tl.minimum(steps, HALF - 1), 0.0).to(tl.int32)  # none for NaN
    return tl.where(p >= 0, HALF + steps, HALF - 1 - steps)


@triton.jit
def pack(flags):
    """Flags [vectors, 64] as int64 [vectors]."""
    return tl.sum(flags.to(tl.int64) << tl.arange(0, 64).to(tl.int64)[None, :], 1)


@triton.jit
def encode_queries(
    q, linear, last, bias, sums, query, at, count, DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr,
    WORDS: tl.constexpr, PLANES: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `at`: a word of TILE queries, or all their words with several planes, which share a scale."""
    TOGETHER: tl.constexpr = WORDS if PLANES > 1 else 1
    word = at % (WORDS // TOGETHER)
    rows = at // (WORDS // TOGETHER) * TILE + tl.arange(0, TILE)
    # Weights are asked for before the vectors are there: the kernel before this one does not write them.
    weights = load_weights(linear, last, bias, word, DIM, PADDED, HIDDEN, BITS)
    if PDL:
        gdc_wait()
    h = load_hidden(sums, rows, count, HIDDEN, PARTS)
    x = load_vectors(q, None, rows, count, 1, 1, 0, DIM, PADDED, UNIT)
    p = (project(x, h, weights, HIDDEN),)
    for w in tl.static_range(1, TOGETHER):
        p += (project(x, h, load_weights(linear, last, bias, w, DIM, PADDED, HIDDEN, BITS), HIDDEN),)
    to = query + rows.to(tl.int64) * PLANES * WORDS + word
    bits = 64 * word + tl.arange(0, 64)[None, :]
    if PLANES == 1:
        tl.store(to, pack((p[0] >= 0) & (bits < BITS)), mask=rows < count)
    else:
        largest = tl.zeros([TILE, 1], tl.float32) + 1.17549435e-38
        for w in tl.static_range(TOGETHER):
            largest = tl.maximum(largest, tl.max(tl.abs(p[w]), 1, keep_dims=True))
        for w in tl.static_range(TOGETHER):  # which passes NaN over
            broken = tl.max((p[w] != p[w]).to(tl.int32), 1, keep_dims=True)
            largest = tl.where(broken != 0, float("nan"), largest)
        for w in tl.static_range(TOGETHER):
            level = level_of(p[w], largest, PLANES)
            for j in tl.static_range(PLANES):
                flags = (((level >> j) & 1) != 0) & (bits + 64 * w < BITS)
                tl.store(to + j * WORDS + w, pack(flags), mask=rows < count)


@triton.jit
def encode_keys(
    k, v, centre, linear, last, bias, sums, keys, values, codes, norms, length, arrived, at, programs, count, T, room,
    code_room, first, DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    HIDDEN: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, PLACED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `at` of so many: appends a word of TILE keys' codes, and with the first word all else of the keys."""
    word, rows = at % WORDS, at // WORDS * TILE + tl.arange(0, TILE)
    weights = load_weights(linear, last, bias, word, DIM, PADDED, HIDDEN, BITS)
    if PDL:
        gdc_wait()
    h = load_hidden(sums, rows, count, HIDDEN, PARTS)
    if PLACED:
        head, column, fits = place(rows, count, first, T, room, code_room)
        x = load_vectors(keys, centre, rows, count, T, room, first, DIM, PADDED, False)
    else:
        filled = tl.where(first < 0, tl.load(length), first)
        x = load_vectors(k, centre, rows, count, T, T, 0, DIM, PADDED, False)
        key, value = load_rows(k, rows, count, DIM, PADDED), load_rows(v, rows, count, DIM, PADDED)
        lengthen(length, arrived, filled + T, programs)
        head, column, fits = place(rows, count, filled, T, room, code_room)
        store_rows(key, keys, head * room + column, fits & (word == 0), DIM, PADDED)
        store_rows(value, values, head * room + column, fits & (word == 0), DIM, PADDED)
    if norms is not None:
        norm = tl.sqrt_rn(tl.sum(x * x, 1)).to(tl.bfloat16)
        tl.store(norms + head * code_room + column, norm, mask=fits & (word == 0))
    used = 64 * word + tl.arange(0, 64)[None, :] < BITS
    code = pack((project(x, h, weights, HIDDEN) >= 0) & used)
    tl.store(codes + (head * code_room + column) * WORDS + word, code, mask=fits)


@triton.jit(do_not_specialize=["first"])
def encode_rows(
    q, k, v, centre, query_linear, query_last, query_bias, query_sums, key_linear, key_last, key_bias, key_sums,
    query, keys, values, codes, norms, length, arrived, queries, new, T, room, code_room, first, DIM: tl.constexpr,
    PADDED: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr, QUERY_HIDDEN: tl.constexpr,
    QUERY_PARTS: tl.constexpr, KEY_HIDDEN: tl.constexpr, KEY_PARTS: tl.constexpr, UNIT: tl.constexpr,
    TILE: tl.constexpr, PLACED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (queries / TILE * (WORDS, or 1 with several planes) + new / TILE * WORDS).

    Args:
        q: [queries, DIM]; k, v: [new, DIM], T rows for each of B * Hkv; centre: float32 [B * Hkv, DIM].
        query_linear, key_linear: float32 [DIM, BITS].
        query_last, query_bias, query_sums: float32 [HIDDEN, BITS], [BITS] and [PARTS, queries, HIDDEN] of an MLP; of
            keys likewise. HIDDEN is 0 without one.
        query: int64 [queries, PLANES, WORDS], written.
        keys, values, codes, norms: [B * Hkv, room, DIM], int64 [B * Hkv, code_room, WORDS], bfloat16
            [B * Hkv, code_room] or None; the T columns from length on are written, those beyond the room are not.
        length, arrived: int32 [1], T is added to the first; the second is 0 between launches.
        first: where the T columns begin; below 0 where the length says so. With PLACED their keys are in place: neither
            k nor v is read, codes and norms are all that is written of them, by programs that need not be there, and
            the length is set.
    """
    split = tl.cdiv(queries, TILE) * (1 if PLANES > 1 else WORDS)
    at = tl.program_id(0)
    if at < split:
        encode_queries(
            q,
            query_linear,
            query_last,
            query_bias,
            query_sums,
            query,
            at,
            queries,
            DIM,
            PADDED,
            BITS,
            WORDS,
            PLANES,
            QUERY_HIDDEN,
            QUERY_PARTS,
            UNIT,
            TILE,
            PDL,
        )
    else:
        encode_keys(
            k,
            v,
            centre,
            key_linear,
            key_last,
            key_bias,
            key_sums,
            keys,
            values,
            codes,
            norms,
            length,
            arrived,
            at - split,
            tl.num_programs(0) - split,
            new,
            T,
            room,
            code_room,
            first,
            DIM,
            PADDED,
            BITS,
            WORDS,
            KEY_HIDDEN,
            KEY_PARTS,
            TILE,
            PLACED,
            PDL,
        )
    if PLACED:  # the first program has waited for the kernel before, and nobody reads it meanwhile
        tl.store(length, first + T, mask=at == 0)
    if PDL:
        gdc_launch_dependents()


class Launch:
    """The kernels' launches, with all that does not change from call to call.

    Args:
        placed: whether keys are in place.
    """

    def __init__(self, like: Newest | Placed, placed: bool) -> None:
        check_nvidia(like.q.device)
        (batch, q_heads, tokens, dim), stored, (of_query, of_key) = like.q.shape, like.stored, like.maps
        assert like.arrived is not None and like.workspace is not None
        bits, words, self._like, self._placed = like.query_bits, stored.codes.shape[3], like, placed
        queries, new = batch * q_heads * tokens, batch * stored.keys.shape[1] * tokens
        self._early = {"launch_pdl": True} if starts_early(like.q.device) else {}
        sums = carve(like.workspace, layer_parts((queries, new), (of_query.widths, of_key.widths)))
        self._query_sums, self._key_sums = sums.get("query"), sums.get("key")
        query_parts, query_hidden = (0, 0) if self._query_sums is None else self._query_sums.shape[::2]
        key_parts, key_hidden = (0, 0) if self._key_sums is None else self._key_sums.shape[::2]
        tile = vectors(queries, bits)
        self._queries = triton.cdiv(queries, tile) * (1 if bits > 1 else words)
        self._keys = triton.cdiv(new, tile) * words
        self._tokens = tokens
        self._weights = *_last(of_query), self._query_sums, *_last(of_key), self._key_sums
        self._held = stored.keys, stored.values, stored.codes, stored.norms, stored.length, like.arrived
        self._numbers = queries, new, tokens, stored.keys.shape[2], stored.codes.shape[2]
        options = {"DIM": dim, "PADDED": triton.next_power_of_2(dim), "BITS": of_query.linear.shape[1], "WORDS": words}
        options |= {"PLANES": bits, "UNIT": of_query.unit, "TILE": tile, "PLACED": placed, "PDL": bool(self._early)}
        options |= {"QUERY_HIDDEN": query_hidden, "QUERY_PARTS": query_parts, "num_warps": 8, **self._early}
        self._options = options | {"KEY_HIDDEN": key_hidden, "KEY_PARTS": key_parts}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, query: Tensor, first: int, new: bool = True) -> Tensor:
        """Queries, and keys that are [B, Hkv, T, D], or [B, Hkv, room, D] and in place from the first on."""
        like, tokens = self._like, self._tokens
        with on(q.device):
            if self._query_sums is not None:
                run_layers(q, None, like.maps[0], self._query_sums, self._early, tokens)
            if new and self._key_sums is not None:
                begin = first if self._placed else 0
                run_layers(k, like.centre, like.maps[1], self._key_sums, self._early, tokens, begin)
            programs = self._queries + (self._keys if new else 0)
            given = q, k, v, like.centre, *self._weights, query, *self._held, *self._numbers, first
            encode_rows[(programs,)](*given, **self._options)
        return query


def prepare(like: Newest) -> Callable[[Tensor, Tensor, Tensor, int | None], Tensor]:
    """Encoding like this, of other queries, keys and values; see :class:`Newest`."""
    launch, shape = Launch(like, placed=False), (*like.q.shape[:3], like.query_bits, like.stored.codes.shape[3])

    def run(q: Tensor, k: Tensor, v: Tensor, first: int | None) -> Tensor:
        query = q.new_empty(shape, dtype=torch.int64)
        return launch(q.contiguous(), k.contiguous(), v.contiguous(), query, -1 if first is None else first)

    return run


def prepare_placed(like: Placed) -> Callable[[Tensor, int, bool], Tensor]:
    """The same of keys that are in place; see :class:`Placed`."""
    launch, stored = Launch(like, placed=True), like.stored
    return lambda q, first, new: launch(q.contiguous(), stored.keys, stored.values, like.query, first, new)


def encode(x: Newest, first: int | None = None) -> Tensor:
    """Once."""
    return prepare(x)(x.q, x.k, x.v, first)


def encode_placed(x: Placed, q: Tensor, first: int, new: bool) -> Tensor:
    """Once."""
    return prepare_placed(x)(q, first, new)


def vectors(queries: int, query_bits: int) -> int:
    """Queries or keys of a program: few, so that every multiprocessor has one, or as many as registers allow."""
    return 1 if queries <= 64 else 4 if query_bits == 1 else 2


def _last(by: Map) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the last layer multiplies with and adds."""
    return (by.linear, by.weights[-1], by.biases[-1]) if by.weights else (by.linear, None, None)
