"""Encoding the newest queries and keys and appending what belongs to the keys in CUDA C++: one kernel."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.cuda.step import TYPES, Launch
from hashattn.ops.decode.device import on_its_device, starts_early
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.sizes import Encoding, carve, counters, together

_LAYERS = "first", "first_bias", "second", "second_bias", "last", "last_bias"
_OTHERS = "v", "held_keys", "held_values", "query", "codes", "norms", "length", "arrived"


class Vectors(ctypes.Structure):
    """Queries or keys, and the map that encodes them: struct Vectors of encode.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "centre", "linear", *_LAYERS, "parts", "straight", "arrived")),
        ("count", ctypes.c_int), ("groups", ctypes.c_int),
    ]  # fmt: skip


class Encode(ctypes.Structure):
    """What the kernel is given: struct Encode of encode.cu."""

    _fields_ = [
        ("queries", Vectors), ("keys", Vectors), *((name, ctypes.c_void_p) for name in _OTHERS),
        *((name, ctypes.c_int) for name in ("tokens", "room", "code_room")),
    ]  # fmt: skip


@on_its_device
def encode(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, maps: tuple[Map, Map], query_bits: int, keys: Tensor,
    values: Tensor, codes: Tensor, length: Tensor, arrived: Tensor, workspace: Tensor, norms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See :func:`hashattn.ops.decode.encode.encode`, which does the same.

    Args:
        q, k, v: of the dtype of keys and values.
        arrived: int32, zeros before and after, as many as :func:`hashattn.ops.decode.sizes.counters` says.
        norms: bfloat16 [B, Hkv, room], contiguous: |k - centre| of what is appended is written to it.

    Raises:
        ValueError: arrived is too short.
        RuntimeError: the kernel does not compile or launch.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, q_heads, tokens, _ = q.shape
    words, bits = codes.shape[3], maps[0].linear.shape[1]
    query = torch.empty((batch, q_heads, tokens, query_bits, words), dtype=torch.int64, device=q.device)
    sizes = Encoding((batch * q_heads * tokens, batch * k.shape[1] * tokens), (maps[0].widths, maps[1].widths), bits)
    parts, (groups, _) = carve(workspace, sizes.parts), sizes.groups
    if arrived.numel() < counters(*sizes.counts):
        raise ValueError(f"arrived has {arrived.numel()} numbers, {counters(*sizes.counts)} are needed")
    argument = Encode(
        _vectors("query", q, maps[0], {"arrived": arrived[1:], **parts}, *(x[0] for x in (sizes.counts, sizes.groups))),
        _vectors(
            "key", k, maps[1], {"centre": centre, "arrived": arrived[1 + groups :], **parts},
            *(x[1] for x in (sizes.counts, sizes.groups)),
        ),
        *(None if x is None else x.data_ptr() for x in (v, keys, values, query, codes, norms, length, arrived)), tokens,
        keys.shape[2], codes.shape[2],
    )  # fmt: skip
    one = launch(sizes, q.shape[3], q.dtype, words, query_bits, maps[0].unit)
    kernel = compiler.kernel(one.name, one.defines, q.get_device())
    compiler.launch(kernel, one.grid, one.threads, argument, early=starts_early(q.device), even=one.even)
    return query


@functools.cache
def launch(sizes: Encoding, dim: int, dtype: torch.dtype, words: int, query_bits: int, unit: bool) -> Launch:
    """The launch that encodes vectors [dim]; unit: queries are scaled to unit mean square."""
    (first, second), (key_first, key_second) = ((*own, 0, 0)[:2] for own in sizes.widths)
    defines = {
        "DIM": dim, "TYPE": TYPES[dtype], "BITS": sizes.bits, "WORDS": words, "PLANES": query_bits, "UNIT": int(unit),
        "VECTORS": together(sizes.counts[0]), "UNITS": sizes.units, "QUERY_FIRST": first, "QUERY_SECOND": second,
        "KEY_FIRST": key_first, "KEY_SECOND": key_second,
    }  # fmt: skip
    return Launch("encode", tuple(defines.items()), (sum(sizes.programs), 1, 1), 256)


def _vectors(name: str, x: Tensor, by: Map, tensors: dict[str, Tensor], count: int, groups: int) -> Vectors:
    own = {key.removeprefix(f"{name}_"): tensor for key, tensor in tensors.items()}
    own |= {"x": x, "linear": by.linear, **dict(zip(_LAYERS, by.tensors[1:], strict=False))}
    pointers = {field[0]: own[field[0]].data_ptr() for field in Vectors._fields_ if field[0] in own}
    return Vectors(**pointers, count=count, groups=groups)
