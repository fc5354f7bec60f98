"""The fused step and what precedes it as operators of torch, which torch.compile takes for one node each.

Their flat arguments are packed and unpacked here alone. Importing this module registers them in the namespace
"hashattn": torch asks for that, so that it is imported where a step is made and nowhere else.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from hashattn.ops.decode import kernels_for, kernels_on, sizes_of
from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.inputs import Before, Inputs, Newest, Outputs, Placed, Stored
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.request import KernelRequest
from hashattn.ops.decode.rule import Rule

_KINDS = {"int | None": "int?", "float | None": "float?", "int": "int", "bool": "bool"}
_NAMES = tuple(f.name for f in fields(Rule))
_RULE = ", ".join(f"{_KINDS[str(f.type)]} {f.name}" for f in fields(Rule))

_OPS = torch.library.Library("hashattn", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_OPS.define(
    "decode(Tensor q, Tensor query, Tensor keys, Tensor values, Tensor codes, Tensor length, Tensor starts, "
    "Tensor(a!) bounds, Tensor(b!) workspace, Tensor? norms, Tensor? centre, Tensor? a, int bits, float scale, "
    f"bool causal, str scores, int page, Tensor? kept, Tensor? weights, {_RULE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_OPS.define(
    "encode(Tensor q, Tensor k, Tensor v, Tensor centre, Tensor[] query_map, Tensor[] key_map, bool unit, "
    "int query_bits, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) codes, Tensor(d!) length, Tensor(e!) arrived, "
    "Tensor(f!) workspace, Tensor(g!)? norms=None) -> Tensor",
    tags=_TAGS,
)
_OPS.define(
    "append(Tensor k, Tensor v, Tensor codes, Tensor? new_norms, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!) stored, Tensor(d!) length, Tensor(e!) arrived, Tensor(f!)? norms=None) -> ()",
    tags=_TAGS,
)
_OPS.define("filled(Tensor length) -> Tensor", tags=_TAGS)


class Decode:
    """A step that is made ready: steps like it give their queries alone.

    Args:
        like: with bounds and a workspace; of q and query shape, dtype and device are looked at.
    """

    def __init__(self, like: Inputs) -> None:
        self.like = like
        self._step = kernels_for(KernelRequest.of(like)).decode(like)

    def __call__(self, q: Tensor, query: Tensor, scale: float, before: Before | None = None) -> Outputs:
        """Search and attend with queries [B, Hq, T, D] and their codes; see :class:`Inputs`.

        Raises:
            RuntimeError: a gradient is wanted, of which nothing would be left.
        """
        if torch.compiler.is_compiling():
            flat = flat_inputs(self.like, q, query, scale, before)
            out, lse, ids, tier, weights = torch.ops.hashattn.decode(*flat)
            wanted = self.like.estimate is not None, self.like.rule.prior_ratio is not None
            return Outputs(out, lse, ids, tier if wanted[0] else None, weights if wanted[1] else None)
        if torch.is_grad_enabled():
            _check_decode(self.like, q)
        return self._step(q, query, scale, before)


class Encode:
    """Encoding that is made ready: what is encoded like this gives the newest queries, keys and values alone.

    Args:
        like: with arrived and a workspace; of q, k and v shape, dtype and device are looked at.
    """

    def __init__(self, like: Newest) -> None:
        self.like = like
        self._encode = kernels_on(like.q.device).encode(like)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, first: int | None = None) -> Tensor:
        """Encode and append; see :class:`Newest`. Returns the packed queries, int64 [B, Hq, T, query_bits, W].

        Args:
            first: filled columns, where the host knows them, as nobody does who traces it.

        Raises:
            RuntimeError: a gradient is wanted, of which nothing would be left.
        """
        if torch.compiler.is_compiling():
            query: Tensor = torch.ops.hashattn.encode(*flat_newest(self.like, q, k, v))
            return query
        if torch.is_grad_enabled():
            _check_stored("encode", self.like.stored, q=q, k=k, v=v)
        return self._encode(q, k, v, first)


class EncodePlaced:
    """The same of keys that are in place, which no graph that is traced has; see :class:`Placed`."""

    def __init__(self, like: Placed) -> None:
        self.like = like
        self._encode = kernels_on(like.q.device).encode_placed(like)

    def __call__(self, q: Tensor, first: int, new: bool) -> Tensor:
        """See :func:`hashattn.ops.decode.encode_reference.encode_placed`.

        Raises:
            RuntimeError: a gradient is wanted, of which nothing would be left.
        """
        if torch.is_grad_enabled():
            _check_stored("encode", self.like.stored, q=q)
        return self._encode(q, first, new)


def append(k: Tensor, v: Tensor, codes: Tensor, norms: Tensor | None, stored: Stored, arrived: Tensor) -> None:
    """See :func:`hashattn.ops.decode.encode_reference.append`; arrived: int32 [1], zero before and after."""
    held = stored.keys, stored.values, stored.codes, stored.length
    if torch.compiler.is_compiling():
        torch.ops.hashattn.append(k, v, codes, norms, *held, arrived, stored.norms)
    else:
        _append(k, v, codes, norms, *held, arrived, stored.norms)


def filled(length: Tensor) -> Tensor:
    """A length, int32 [1], as int64 [] that stays what it is when the length goes on.

    What a traced graph reads of a tensor that operators write, it must read through an operator: inductor may compute
    anything else later than it was asked for, from what has been written meanwhile.
    """
    now: Tensor = torch.ops.hashattn.filled(length)
    return now


def flat_inputs(x: Inputs, q: Tensor, query: Tensor, scale: float, before: Before | None = None) -> tuple[Any, ...]:
    """What hashattn::decode takes for a step like this one."""
    held, by = x.stored, x.estimate
    estimate = (None, None, None, 0) if by is None else (by.norms, by.centre, by.a, by.bits)
    stored = held.keys, held.values, held.codes, held.length
    rule = [getattr(x.rule, name) for name in _NAMES]
    kept = before or (None, None)
    kind = x.causal, x.scores, x.page
    return (q, query, *stored, x.starts, x.bounds, x.workspace, *estimate, scale, *kind, *kept, *rule)


def _inputs(*given: Any) -> Inputs:
    """The step that hashattn::decode was given flat."""
    (q, query, *stored), (starts, bounds, workspace, *estimate) = given[:6], given[6:13]
    scale, causal, scores, page, kept, weights, *rule = given[13:]
    by = None if estimate[0] is None else Estimate(*estimate)
    before = None if kept is None else Before(kept, weights)
    step = Inputs(q, query, Stored(*stored), starts, Rule(*rule), scale, causal, by, bounds, workspace)
    return replace(step, before=before, scores=scores, page=page)


def flat_newest(x: Newest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What hashattn::encode takes for encoding like this."""
    (of_query, of_key), held = x.maps, x.stored
    maps = of_query.tensors, of_key.tensors, of_query.unit, x.query_bits
    stored = held.keys, held.values, held.codes, held.length
    return (q, k, v, x.centre, *maps, *stored, x.arrived, x.workspace, held.norms)


def _newest(*given: Any) -> Newest:
    """What hashattn::encode was given flat."""
    (q, k, v, centre, of_query, of_key, unit, query_bits), (*stored, arrived, workspace) = given[:8], given[8:14]
    maps, held = (Map.of(of_query, unit), Map.of(of_key)), Stored(*stored, *given[14:])
    return Newest(q, k, v, centre, maps, query_bits, held, arrived, workspace)


def _refuse_gradients(name: str, **given: Tensor) -> None:
    """Raise RuntimeError where a gradient is wanted of any of them, of which nothing would be left."""
    wanted = [argument for argument, x in given.items() if x.requires_grad]
    if wanted and torch.is_grad_enabled():
        raise RuntimeError(
            f"hashattn::{name} is not differentiable, and a gradient is wanted of {', '.join(wanted)}: "
            'call it under torch.no_grad(), or attend with engine="reference"'
        )


def _check_decode(x: Inputs, q: Tensor) -> None:
    estimate = {} if x.estimate is None else {"a": x.estimate.a}
    _refuse_gradients("decode", q=q, keys=x.stored.keys, values=x.stored.values, **estimate)


def _check_stored(name: str, stored: Stored, **new: Tensor) -> None:
    _refuse_gradients(name, **new, keys=stored.keys, values=stored.values)


def _decode(*given: Any) -> tuple[Tensor, ...]:
    x = _inputs(*given)
    _check_decode(x, x.q)
    out, lse, ids, tier, weights = kernels_for(KernelRequest.of(x)).decode(x)(x.q, x.query, x.scale, x.before)
    nothing = ids.new_empty(0, dtype=torch.int8), lse.new_empty(0)
    return out, lse, ids, nothing[0] if tier is None else tier, nothing[1] if weights is None else weights


def _encode(*given: Any) -> Tensor:
    x = _newest(*given)
    _check_stored("encode", x.stored, q=x.q, k=x.k, v=x.v)
    return kernels_on(x.q.device).encode(x)(x.q, x.k, x.v, None)


def _append(k: Tensor, v: Tensor, codes: Tensor, new_norms: Tensor | None, *given: Any) -> None:
    *stored, arrived = given[:5]
    held = Stored(*stored, *given[5:])
    _check_stored("append", held, k=k, v=v)
    kernels_on(k.device).append(k, v, codes, new_norms, held, arrived)


for _device in ("CPU", "CUDA"):
    _OPS.impl("decode", _decode, _device)
    _OPS.impl("encode", _encode, _device)
    _OPS.impl("append", _append, _device)


@torch.library.register_fake("hashattn::decode", lib=_OPS)
def _decode_fake(*given: Any) -> tuple[Tensor, ...]:
    x = _inputs(*given)
    _check_decode(x, x.q)
    sizes = sizes_of(x)
    shape = sizes.batch, sizes.q_heads // sizes.summed, sizes.tokens, sizes.slots
    tier = x.q.new_empty(0 if x.estimate is None else shape, dtype=torch.int8)
    lse, ids = x.q.new_empty(x.q.shape[:3], dtype=torch.float32), x.q.new_empty(shape, dtype=torch.int32)
    weighed = x.rule.prior_ratio is not None
    weights = lse.new_empty((*x.q.shape[:3], sizes.slots) if weighed else 0)
    return x.q.new_empty(x.q.shape), lse, ids, tier, weights


@torch.library.register_fake("hashattn::encode", lib=_OPS)
def _encode_fake(*given: Any) -> Tensor:
    x = _newest(*given)
    _check_stored("encode", x.stored, q=x.q, k=x.k, v=x.v)
    return x.q.new_empty((*x.q.shape[:3], x.query_bits, x.stored.codes.shape[3]), dtype=torch.int64)


@torch.library.register_fake("hashattn::append", lib=_OPS)
def _append_fake(*given: Any) -> None:
    return None


@torch.library.impl(_OPS, "filled", "CompositeExplicitAutograd")
def _filled(length: Tensor) -> Tensor:
    return length[0].long()


@torch.library.register_fake("hashattn::filled", lib=_OPS)
def _filled_fake(length: Tensor) -> Tensor:
    return length.new_empty((), dtype=torch.int64)
