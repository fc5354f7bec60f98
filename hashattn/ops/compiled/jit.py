"""How the loops are compiled: by Numba, with a few of LLVM's own operations that Python has no words for."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I1, I8, I16, I32, I64, F32 = (
    ir.IntType(1),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
)
NAN_SAFE = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order, and NaN and infinity as they are

exactly = numba.njit(nogil=True, error_model="numpy")  # in the order and with the operations as written
inlined = numba.njit(fastmath=NAN_SAFE, nogil=True, error_model="numpy")  # into what is compiled


def compiled(function: Any) -> Any:
    """The same, kept on disk for the next process: beside the source, or where NUMBA_CACHE_DIR says."""
    options = {"fastmath": NAN_SAFE, "nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError as error:  # no folder that can be written
        warnings.warn(f"compiled loops are compiled anew in every process: {error}; set NUMBA_CACHE_DIR", stacklevel=2)
        return numba.njit(**options)(function)


def sources() -> int:
    """A number that changes with the sources of this folder."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def _llvm(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [x.type for x in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, to: Any) -> Any:
    """To element `at` of a contiguous array, as one of another type."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), to.as_pointer())


def _all(builder: Any, lanes: list[Any]) -> Any:
    vector = ir.Constant(ir.VectorType(lanes[0].type, len(lanes)), ir.Undefined)
    for i, lane in enumerate(lanes):
        vector = builder.insert_element(vector, lane, ir.Constant(I32, i))
    return vector


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


@intrinsic
def popcount(typing: Any, x: Any) -> Any:
    """Set bits of a uint64."""
    return types.uint64(types.uint64), lambda c, b, s, a: _llvm(b, "llvm.ctpop.i64", I64, a[0])


@intrinsic
def lowest_bit(typing: Any, x: Any) -> Any:
    """Number of the lowest set bit of a uint64 that has one."""
    zero = ir.Constant(I1, 1)
    return types.uint64(types.uint64), lambda c, b, s, a: _llvm(b, "llvm.cttz.i64", I64, a[0], zero)


@intrinsic
def from_bits(typing: Any, x: Any) -> Any:
    """The float32 of a uint32's bits."""
    return types.float32(types.uint32), lambda c, b, s, a: b.bitcast(a[0], F32)


@intrinsic
def to_bits(typing: Any, x: Any) -> Any:
    """The bits of a float32, as uint32."""
    return types.uint32(types.float32), lambda c, b, s, a: b.bitcast(a[0], I32)


def _as_pointer(context: Any, builder: Any, signature: Any, a: Any) -> Any:
    return builder.inttoptr(a[0], context.get_value_type(signature.return_type))


@intrinsic
def lying_at(typing: Any, address: Any, like: Any) -> Any:
    """What lies at an address, for carray: numbers of `like`'s type."""
    return types.CPointer(like)(types.int64, like), _as_pointer


@intrinsic
def prefetch(typing: Any, array: Any, at: Any) -> Any:
    """Fetch the line of element `at` ahead, into the second cache."""

    def build(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], a[0], a[1], I8)
        to = [ir.Constant(I32, x) for x in (0, 2, 1)]  # to be read, of middling locality, data
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [pointer, *to])
        return context.get_dummy_value()

    return types.void(array, types.int64), build


@intrinsic
def at_most(typing: Any, array: Any, at: Any, most: Any) -> Any:
    """Of 64 bytes from `at` on: bit i is array[at + i] <= most."""

    def build(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        wide = ir.VectorType(I8, 64)
        held = builder.load(_pointer(context, builder, signature.args[0], a[0], a[1], wide), align=1)
        limit = _pick(builder, _all(builder, [a[2]]), ir.Constant(ir.VectorType(I8, 1), ir.Undefined), [0] * 64)
        return builder.bitcast(builder.icmp_unsigned("<=", held, limit), I64)

    return types.uint64(array, types.int64, types.uint8), build


@intrinsic
def signs(typing: Any, array: Any, at: Any) -> Any:
    """Of 64 float32 from `at` on: bit i is array[at + i] >= 0."""

    def build(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        wide = ir.VectorType(F32, 64)
        held = builder.load(_pointer(context, builder, signature.args[0], a[0], a[1], wide), align=4)
        return builder.bitcast(builder.fcmp_ordered(">=", held, ir.Constant(wide, [0.0] * 64)), I64)

    return types.uint64(array, types.int64), build


def _add_distances(words: int) -> Any:
    """Of 16 / words keys at a time: weight times their codes' distances to a query's is put into, or added to, sums."""

    @intrinsic
    def add(typing: Any, codes: Any, key: Any, query: Any, row: Any, weight: Any, sums: Any, at: Any, more: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, a: Any) -> Any:
            quad, keys, step = ir.VectorType(I64, 4), 16 // words, ir.Constant(I64, words)
            pointer = _pointer(context, builder, signature.args[2], a[2], builder.mul(a[3], step), I64)
            own = [builder.load(builder.gep(pointer, [ir.Constant(I64, i)])) for i in range(words)]
            query = _all(builder, own * (4 // words))
            first = builder.mul(a[1], step)
            total = None
            for j in range(4):
                place = builder.add(first, ir.Constant(I64, 4 * j))
                held = builder.load(_pointer(context, builder, signature.args[0], a[0], place, quad), align=8)
                count = _llvm(builder, "llvm.ctpop.v4i64", quad, builder.xor(held, query))
                shifted = builder.shl(count, ir.Constant(quad, [16 * j] * 4)) if j else count
                total = shifted if total is None else builder.or_(total, shifted)
            lanes = builder.bitcast(total, ir.VectorType(I16, 16))  # lane 4 * i + j: word i of the j-th four words
            if words >= 2:
                lanes = builder.add(lanes, _pick(builder, lanes, lanes, [(i + 4) % 8 + i // 8 * 8 for i in range(16)]))
            if words == 4:
                lanes = builder.add(lanes, _pick(builder, lanes, lanes, [(i + 8) % 16 for i in range(16)]))
            order = [4 * words * (i % (4 // words)) + i // (4 // words) for i in range(keys)]
            vector = ir.VectorType(I16, keys)
            found = builder.mul(_pick(builder, lanes, lanes, order), _splat(builder, a[4], keys))
            place = _pointer(context, builder, signature.args[5], a[5], a[6], vector)
            before = builder.select(a[7], builder.load(place, align=2), ir.Constant(vector, [0] * keys))
            builder.store(builder.add(found, before), place, align=2)
            return context.get_dummy_value()

        number = types.int64
        return types.void(codes, number, query, number, types.uint16, sums, number, types.boolean), build

    return add


@intrinsic
def nearer_bytes(typing: Any, sums: Any, at: Any, base: Any, near: Any, to: Any) -> Any:
    """Of 16 numbers from `at` on: what they are above `base`, at most 255, as bytes from `to` on."""

    def build(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        wide, narrow = ir.VectorType(I16, 16), ir.VectorType(I8, 16)
        held = builder.load(_pointer(context, builder, signature.args[0], a[0], a[1], wide), align=2)
        above = _llvm(builder, "llvm.usub.sat.v16i16", wide, held, _splat(builder, a[2], 16))
        most = _llvm(builder, "llvm.umin.v16i16", wide, above, ir.Constant(wide, [255] * 16))
        place = _pointer(context, builder, signature.args[3], a[3], a[4], narrow)
        builder.store(builder.trunc(most, narrow), place, align=1)
        return context.get_dummy_value()

    return types.void(sums, types.int64, types.uint16, near, types.int64), build


@intrinsic
def tally(typing: Any, near: Any, at: Any, most: Any, votes: Any) -> Any:
    """Of 64 bytes from `at` on: one vote more where near[at + i] <= most."""

    def build(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        wide = ir.VectorType(I8, 64)
        held = builder.load(_pointer(context, builder, signature.args[0], a[0], a[1], wide), align=1)
        place = _pointer(context, builder, signature.args[3], a[3], a[1], wide)
        one = builder.zext(builder.icmp_unsigned("<=", held, _splat(builder, a[2], 64)), wide)
        builder.store(builder.add(builder.load(place, align=1), one), place, align=1)
        return context.get_dummy_value()

    return types.void(near, types.int64, types.uint8, votes), build


@intrinsic
def shifted(typing: Any, near: Any, at: Any, more: Any, less: Any, to: Any) -> Any:
    """Of 64 bytes from `at` on: near + more - less, at most 255 before the difference and at least 0 after it."""

    def build(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        wide = ir.VectorType(I8, 64)
        held, own = (
            builder.load(_pointer(context, builder, signature.args[i], a[i], a[1], wide), align=1) for i in (0, 2)
        )
        raised = _llvm(builder, "llvm.uadd.sat.v64i8", wide, held, own)
        found = _llvm(builder, "llvm.usub.sat.v64i8", wide, raised, _splat(builder, a[3], 64))
        builder.store(found, _pointer(context, builder, signature.args[4], a[4], a[1], wide), align=1)
        return context.get_dummy_value()

    return types.void(near, types.int64, more, types.uint8, to), build


def _splat(builder: Any, x: Any, lanes: int) -> Any:
    one = _all(builder, [x])
    return _pick(builder, one, ir.Constant(one.type, ir.Undefined), [0] * lanes)


add_distances_1, add_distances_2, add_distances_4 = (_add_distances(words) for words in (1, 2, 4))


@intrinsic
def number(typing: Any, x: Any) -> Any:
    """An element of an array of float32, or of bfloat16 as uint16, as float32."""
    if x is not types.uint16:
        return types.float32(types.float32), lambda c, b, s, a: a[0]
    half = ir.Constant(I32, 16)
    return types.float32(types.uint16), lambda c, b, s, a: b.bitcast(b.shl(b.zext(a[0], I32), half), F32)


@intrinsic
def stored(typing: Any, x: Any, like: Any) -> Any:
    """A float32 as it is kept beside numbers of `like`'s type: itself, or bfloat16 as uint16, to the nearest, even."""
    if like is not types.uint16:
        return types.float32(types.float32, like), lambda c, b, s, a: a[0]

    def build(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        bits, half, one = builder.bitcast(a[0], I32), ir.Constant(I32, 16), ir.Constant(I32, 1)
        even = builder.and_(builder.lshr(bits, half), one)
        near = builder.lshr(builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), even), half)
        kept = builder.select(builder.fcmp_unordered("uno", a[0], a[0]), ir.Constant(I32, 0x7FC0), near)
        return builder.trunc(kept, I16)

    return types.uint16(types.float32, like), build
