"""Encoding the newest queries and keys and appending what belongs to the keys in CUDA C++: one kernel."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

import torch
from torch import Tensor

from hashattn.ops.decode.cuda.launches import TYPES, Launch
from hashattn.ops.decode.device import check_nvidia, on, stream_of
from hashattn.ops.decode.inputs import Newest, Placed
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.sizes import Encoding, counters, places, together

_LAYERS = "first", "first_bias", "second", "second_bias", "last", "last_bias"
_OTHERS = "v", "held_keys", "held_values", "query", "codes", "norms", "length", "arrived"


class Vectors(ctypes.Structure):
    """Queries or keys, and the map that encodes them: struct Vectors of encode.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "centre", "linear", *_LAYERS, "parts", "straight", "arrived")),
        *(("count", ctypes.c_int), ("groups", ctypes.c_int)),
    )


class Arguments(ctypes.Structure):
    """What the kernel is given: struct Encode of encode.cu."""

    _fields_ = (
        *(("queries", Vectors), ("keys", Vectors)),
        *((name, ctypes.c_void_p) for name in _OTHERS),
        *((name, ctypes.c_int) for name in ("tokens", "room", "code_room", "first")),
    )


class Prepared:
    """Encoding whose struct and launch are made: a call writes where the newest vectors are, and launches.

    Args:
        like: q, k and v of the dtype of keys and values.

    Raises:
        ValueError: arrived is too short.
        RuntimeError: the kernel does not compile.
    """

    def __init__(self, like: Newest) -> None:
        self._device, self._held = like.q.device, (like.stored, like.centre, like.maps, like.arrived, like.workspace)
        self._query = *like.q.shape[:3], like.query_bits, like.stored.codes.shape[3]
        self._arguments = _arguments(like)
        with on(self._device):
            self._launcher = _launch(like, placed=False).bound(self._arguments, self._device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, first: int | None = None) -> Tensor:
        """See :func:`hashattn.ops.decode.encode_reference.encode`.

        Raises:
            RuntimeError: the kernel does not launch.
        """
        arguments, q, k, v = self._arguments, q.contiguous(), k.contiguous(), v.contiguous()
        query = q.new_empty(self._query, dtype=torch.int64)
        arguments.queries.x, arguments.keys.x, arguments.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        arguments.query, arguments.first = query.data_ptr(), -1 if first is None else first
        with on(self._device):
            self._launcher(stream_of(self._device))
        return query


class PreparedPlaced:
    """The same of keys that are in place. Where these have codes already, only queries are given programs.

    Raises:
        ValueError, RuntimeError: as above.
    """

    def __init__(self, like: Placed) -> None:
        self._device, self._held = like.q.device, (like.stored, like.centre, like.maps, like.arrived, like.workspace)
        self._query = like.query
        self._arguments = _arguments(like)
        self._arguments.keys.x, self._arguments.query = like.stored.keys.data_ptr(), self._query.data_ptr()
        both = _launch(like, placed=True)
        alone = replace(both, grid=(_sizes(like).programs[0], 1, 1))
        with on(self._device):
            self._queries, self._both = (one.bound(self._arguments, self._device) for one in (alone, both))

    def __call__(self, q: Tensor, first: int, new: bool) -> Tensor:
        """See :func:`hashattn.ops.decode.encode_reference.encode_placed`.

        Raises:
            RuntimeError: the kernel does not launch.
        """
        arguments, q = self._arguments, q.contiguous()
        arguments.first, arguments.queries.x = first, q.data_ptr()
        with on(self._device):
            (self._both if new else self._queries)(stream_of(self._device))
        return self._query


def encode(x: Newest, first: int | None = None) -> Tensor:
    """Once, made ready for itself alone."""
    return Prepared(x)(x.q, x.k, x.v, first)


def encode_placed(x: Placed, q: Tensor, first: int, new: bool) -> Tensor:
    """Once, made ready for itself alone."""
    return PreparedPlaced(x)(q, first, new)


@functools.cache
def launch(
    sizes: Encoding, dim: int, dtype: torch.dtype, words: int, query_bits: int, unit: bool, placed: bool = False
) -> Launch:
    """The launch that encodes vectors [dim]; unit: queries are scaled to unit mean square; placed: see above."""
    (first, second), (key_first, key_second) = ((*own, 0, 0)[:2] for own in sizes.widths)
    defines = {"DIM": dim, "TYPE": TYPES[dtype], "BITS": sizes.bits, "WORDS": words, "PLANES": query_bits}
    defines |= {"UNIT": int(unit), "VECTORS": together(sizes.counts[0]), "UNITS": sizes.units, "PLACED": int(placed)}
    defines |= {"QUERY_FIRST": first, "QUERY_SECOND": second, "KEY_FIRST": key_first, "KEY_SECOND": key_second}
    return Launch("encode", tuple(defines.items()), (sum(sizes.programs), 1, 1), 256)


def _launch(like: Newest | Placed, placed: bool) -> Launch:
    words, unit = like.stored.codes.shape[3], like.maps[0].unit
    return launch(_sizes(like), like.q.shape[3], like.q.dtype, words, like.query_bits, unit, placed)


def _sizes(like: Newest | Placed) -> Encoding:
    (batch, q_heads, tokens, _), (of_query, of_key) = like.q.shape, like.maps
    counts = batch * q_heads * tokens, batch * like.stored.keys.shape[1] * tokens
    return Encoding(counts, (of_query.widths, of_key.widths), of_query.linear.shape[1])


def _arguments(like: Newest | Placed) -> Arguments:
    """All but what a call gives."""
    check_nvidia(like.q.device)
    stored, arrived, sizes, (of_query, of_key) = like.stored, like.arrived, _sizes(like), like.maps
    assert arrived is not None and like.workspace is not None
    if arrived.numel() < counters(*sizes.counts):
        raise ValueError(f"arrived has {arrived.numel()} numbers, {counters(*sizes.counts)} are needed")
    parts, (groups, _) = places(like.workspace.data_ptr(), sizes.parts), sizes.groups
    queries = _vectors("query", of_query, parts, sizes.counts[0], arrived[1:])
    keys = _vectors("key", of_key, parts, sizes.counts[1], arrived[1 + groups :])
    queries.groups, keys.groups = sizes.groups
    keys.centre = like.centre.data_ptr()
    found = Arguments(queries, keys, tokens=like.q.shape[2], room=stored.keys.shape[2], code_room=stored.codes.shape[2])
    found.held_keys, found.held_values = stored.keys.data_ptr(), stored.values.data_ptr()
    found.codes, found.length, found.arrived = stored.codes.data_ptr(), stored.length.data_ptr(), arrived.data_ptr()
    found.norms = None if stored.norms is None else stored.norms.data_ptr()
    return found


def _vectors(name: str, by: Map, parts: dict[str, int], count: int, arrived: Tensor) -> Vectors:
    """Those of this name, all but where they are; parts: where the buffers of the workspace begin."""
    buffers = {key.removeprefix(f"{name}_"): at for key, at in parts.items() if key.startswith(f"{name}_")}
    layers = {key: tensor.data_ptr() for key, tensor in zip(_LAYERS, by.tensors[1:], strict=False)}
    return Vectors(linear=by.linear.data_ptr(), **layers, **buffers, arrived=arrived.data_ptr(), count=count)
