"""The fused step and what precedes it as operators of torch, which torch.compile takes for one node each.

On CUDA they launch the kernels, on the CPU they run the specifications. Importing this module registers them in the
namespace "hashattn": torch asks for that, so that it is imported where a step is made and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from hashattn.ops.decode import append_reference, reference, reference_tiers
from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.sizes import Sizes

Result = TypeVar("Result")

_KINDS = {"int | None": "int?", "float | None": "float?", "int": "int", "bool": "bool"}
_NAMES = tuple(f.name for f in fields(Rule))
_RULE = ", ".join(f"{_KINDS[str(f.type)]} {f.name}" for f in fields(Rule))

_OPS = torch.library.Library("hashattn", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_OPS.define(
    "decode(Tensor q, Tensor query, Tensor keys, Tensor values, Tensor codes, Tensor starts, Tensor length, "
    f"Tensor(a!) bounds, Tensor(b!) workspace, float scale, bool causal, {_RULE}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_OPS.define(
    "decode_tiers(Tensor q, Tensor query, Tensor keys, Tensor values, Tensor codes, Tensor starts, Tensor length, "
    "Tensor(a!) bounds, Tensor norms, Tensor centre, Tensor a, int bits, Tensor(b!) workspace, float scale, "
    f"bool causal, {_RULE}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_OPS.define(
    "append(Tensor k, Tensor v, Tensor codes, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) stored, "
    "Tensor(d!) length, Tensor(e!) arrived, Tensor? new_norms=None, Tensor(f!)? norms=None) -> ()",
    tags=_TAGS,
)
_OPS.define(
    "encode(Tensor q, Tensor k, Tensor v, Tensor centre, Tensor[] query_map, Tensor[] key_map, bool unit, "
    "int query_bits, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) codes, Tensor(d!) length, Tensor(e!) arrived, "
    "Tensor(f!) workspace, Tensor(g!)? norms=None) -> Tensor",
    tags=_TAGS,
)
_OPS.define("filled(Tensor length) -> Tensor", tags=_TAGS)


def decode(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, rule: Rule, workspace: Tensor, *, scale: float, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hashattn.ops.decode.triton.decode`."""
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.hashattn.decode(
        q, query, keys, values, codes, starts, length, bounds, workspace, scale, causal,
        *[getattr(rule, name) for name in _NAMES],
    )  # fmt: skip
    return out


def decode_tiers(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, estimate: Estimate, rule: Rule, workspace: Tensor, *, scale: float, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hashattn.ops.decode.triton.decode_tiers`."""
    out: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.hashattn.decode_tiers(
        q, query, keys, values, codes, starts, length, bounds, estimate.norms, estimate.centre, estimate.a,
        estimate.bits, workspace, scale, causal, *[getattr(rule, name) for name in _NAMES],
    )  # fmt: skip
    return out


def append(
    k: Tensor, v: Tensor, codes: Tensor, keys: Tensor, values: Tensor, stored: Tensor, length: Tensor, arrived: Tensor,
    new_norms: Tensor | None = None, norms: Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`hashattn.ops.decode.append.append`."""
    torch.ops.hashattn.append(k, v, codes, keys, values, stored, length, arrived, new_norms, norms)


def encode(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, maps: tuple[Map, Map], query_bits: int, keys: Tensor,
    values: Tensor, codes: Tensor, length: Tensor, arrived: Tensor, workspace: Tensor, norms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See :func:`hashattn.ops.decode.encode.encode`."""
    of_query, of_key = maps
    query: Tensor = torch.ops.hashattn.encode(
        q, k, v, centre, of_query.tensors, of_key.tensors, of_query.unit, query_bits, keys, values, codes, length,
        arrived, workspace, norms,
    )  # fmt: skip
    return query


def filled(length: Tensor) -> Tensor:
    """A length, int32 [1], as int64 [] that stays what it is when the length goes on.

    What a traced graph reads of a tensor that operators write, it must read through an operator: inductor may compute
    anything else later than it was asked for, from what has been written meanwhile.
    """
    now: Tensor = torch.ops.hashattn.filled(length)
    return now


def _not_differentiable(name: str, **places: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Refuse to run where the arguments in these places want a gradient, of which nothing would be left.

    Args:
        name: of the operator.
    """

    def refusing(run: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(run)
        def checked(*given: Any) -> Result:
            if torch.is_grad_enabled():
                wanted = [argument for argument, place in places.items() if given[place].requires_grad]
                if wanted:
                    raise RuntimeError(
                        f"hashattn::{name} is not differentiable, and a gradient is wanted of {', '.join(wanted)}: "
                        'call it under torch.no_grad(), or attend with engine="reference"'
                    )
            return run(*given)

        return checked

    return refusing


_of_decode = _not_differentiable("decode", q=0, keys=2, values=3)
_of_decode_tiers = _not_differentiable("decode_tiers", q=0, keys=2, values=3, a=10)
_of_append = _not_differentiable("append", k=0, v=1, keys=3, values=4)
_of_encode = _not_differentiable("encode", q=0, k=1, v=2, keys=8, values=9)


@torch.library.impl(_OPS, "decode", "CUDA")
@_of_decode
def _decode_cuda(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, workspace: Tensor, scale: float, causal: bool, *rule: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from hashattn.ops.decode.gpu import decode as fused

    return fused(
        q.contiguous(), query, keys, values, codes, starts, length, bounds, Rule(*rule), workspace, scale=scale,
        causal=causal,
    )  # fmt: skip


@torch.library.impl(_OPS, "decode", "CPU")
@_of_decode
def _decode_cpu(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, workspace: Tensor, scale: float, causal: bool, *rule: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = Sizes.of(q, query, keys, codes, Rule(*rule))
    out, lse, ids = reference(
        q, query, keys, values, codes, starts, length.clamp(max=sizes.limit), sizes.rule, scale=scale, causal=causal
    )
    return *_as_kernels_do(out, lse, int(length) > sizes.limit), _padded(ids, sizes.slots, -1)


def _as_kernels_do(out: Tensor, lse: Tensor, outgrown: bool) -> tuple[Tensor, Tensor]:
    """Contiguous; nothing beyond the room is read, and the result says so."""
    return (torch.full_like(out, torch.nan) if outgrown else out).contiguous(), lse.contiguous()


def _padded(x: Tensor, slots: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, slots - x.shape[-1]), value=value)


@torch.library.register_fake("hashattn::decode", lib=_OPS)
@_of_decode
def _decode_fake(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, workspace: Tensor, scale: float, causal: bool, *rule: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = Sizes.of(q, query, keys, codes, Rule(*rule))
    ids = q.new_empty((sizes.batch, q.shape[1] // sizes.summed, sizes.tokens, sizes.slots), dtype=torch.int32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32), ids


@torch.library.impl(_OPS, "decode_tiers", "CUDA")
@_of_decode_tiers
def _decode_tiers_cuda(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, norms: Tensor, centre: Tensor, a: Tensor, bits: int, workspace: Tensor, scale: float,
    causal: bool, *rule: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from hashattn.ops.decode.triton import decode_tiers as fused

    return fused(
        q.contiguous(), query, keys, values, codes, starts, length, bounds, Estimate(norms, centre, a, bits),
        Rule(*rule), workspace, scale=scale, causal=causal,
    )  # fmt: skip


@torch.library.impl(_OPS, "decode_tiers", "CPU")
@_of_decode_tiers
def _decode_tiers_cpu(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, norms: Tensor, centre: Tensor, a: Tensor, bits: int, workspace: Tensor, scale: float,
    causal: bool, *rule: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = Sizes.of(q, query, keys, codes, Rule(*rule))
    out, lse, ids, tier = reference_tiers(
        q, query, keys, values, codes, starts, length.clamp(max=sizes.limit), Estimate(norms, centre, a, bits),
        sizes.rule, scale=scale, causal=causal,
    )  # fmt: skip
    padded = _padded(ids, sizes.slots, -1), _padded(tier, sizes.slots, 0)
    return *_as_kernels_do(out, lse, int(length) > sizes.limit), *padded


@torch.library.register_fake("hashattn::decode_tiers", lib=_OPS)
@_of_decode_tiers
def _decode_tiers_fake(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, norms: Tensor, centre: Tensor, a: Tensor, bits: int, workspace: Tensor, scale: float,
    causal: bool, *rule: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse, ids = _decode_fake(q, query, keys, values, codes, starts, length, bounds, workspace, scale, causal, *rule)
    return out, lse, ids, torch.empty_like(ids, dtype=torch.int8)


@torch.library.impl(_OPS, "append", "CUDA")
@_of_append
def _append_cuda(
    k: Tensor, v: Tensor, codes: Tensor, keys: Tensor, values: Tensor, stored: Tensor, length: Tensor, arrived: Tensor,
    *norms: Tensor | None,
) -> None:  # fmt: skip
    from hashattn.ops.decode.append import append as fused

    fused(k, v, codes, keys, values, stored, length, arrived, *norms)


@torch.library.impl(_OPS, "append", "CPU")
@_of_append
def _append_cpu(
    k: Tensor, v: Tensor, codes: Tensor, keys: Tensor, values: Tensor, stored: Tensor, length: Tensor, arrived: Tensor,
    *norms: Tensor | None,
) -> None:  # fmt: skip
    append_reference.append(k, v, codes, keys, values, stored, length, *norms)


@torch.library.register_fake("hashattn::append", lib=_OPS)
@_of_append
def _append_fake(*given: Tensor | None) -> None:
    return None


@torch.library.impl(_OPS, "encode", "CUDA")
@_of_encode
def _encode_cuda(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, query_map: list[Tensor], key_map: list[Tensor], unit: bool,
    query_bits: int, keys: Tensor, values: Tensor, codes: Tensor, length: Tensor, arrived: Tensor, workspace: Tensor,
    norms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from hashattn.ops.decode.gpu import encode as fused

    maps = Map.of(query_map, unit), Map.of(key_map)
    return fused(q, k, v, centre, maps, query_bits, keys, values, codes, length, arrived, workspace, norms)


@torch.library.impl(_OPS, "encode", "CPU")
@_of_encode
def _encode_cpu(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, query_map: list[Tensor], key_map: list[Tensor], unit: bool,
    query_bits: int, keys: Tensor, values: Tensor, codes: Tensor, length: Tensor, arrived: Tensor, workspace: Tensor,
    norms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    maps = Map.of(query_map, unit), Map.of(key_map)
    return append_reference.encode(q, k, v, centre, maps, query_bits, keys, values, codes, length, norms)


@torch.library.register_fake("hashattn::encode", lib=_OPS)
@_of_encode
def _encode_fake(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, query_map: list[Tensor], key_map: list[Tensor], unit: bool,
    query_bits: int, keys: Tensor, values: Tensor, codes: Tensor, *_: Tensor | None,
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:3], query_bits, codes.shape[3]), dtype=torch.int64)


@torch.library.impl(_OPS, "filled", "CompositeExplicitAutograd")
def _filled(length: Tensor) -> Tensor:
    return length[0].long()


@torch.library.register_fake("hashattn::filled", lib=_OPS)
def _filled_fake(length: Tensor) -> Tensor:
    return length.new_empty((), dtype=torch.int64)
