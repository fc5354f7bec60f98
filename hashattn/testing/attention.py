"""What every composition promises, whatever its parts are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.check_codes import alike
from hashattn.cache.kv_cache import KVCache
from hashattn.testing.inputs import DTYPES, Inputs, Shape, inputs
from hashattn.testing.promise import near, promise


def check_attention(attn: HashAttention, *, shape: Shape | None = None, part: object = None) -> None:
    """What a cache has been through changes nothing: chunks, crops, reordered rows, copies, padding, batch mates.

    Codes may differ in bits whose projection is near zero; outputs are compared where all codes are equal.

    Args:
        attn: a composition for one layer, fitted.
        shape: of the inputs.
        part: whom messages blame; the whole composition by default.

    Raises:
        AssertionError: it breaks a promise.
    """
    shape, part = shape or Shape(), part if part is not None else attn
    attn = attn.replace(engine="reference") if attn.attend.needs_selection else attn
    data = inputs(shape, attn)
    promise(
        "engine"
        in str(attn.explain(q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, keys=1000)),
        part,
        "explain() has a query plan",
    )
    _check_outputs(attn, shape, part)
    _check_rows(attn, data, part)
    _check_life(attn, data, part)
    _check_refusal(attn, data, part)


def empty(attn: HashAttention, data: Inputs, capacity: int | None = None) -> KVCache:
    """A cache for inputs of this shape."""
    batch, kv_heads, _, head_dim = data.k.shape
    return attn.new_cache(batch, kv_heads, head_dim, capacity=capacity)


def filled(attn: HashAttention, data: Inputs) -> KVCache:
    """A cache of all keys at once."""
    cache = empty(attn, data)
    cache.append(data.k, data.v, start=data.start)
    return cache


def close_codes(codes: Tensor, expected: Tensor, kind: str) -> bool:
    """Whether codes of this kind are the same but for rounding: packed ones in 49 of 50 keys."""
    if codes.shape != expected.shape or codes.dtype != expected.dtype:
        return False
    if kind in ("binary", "buckets", "pq"):
        return bool((codes != expected).any(-1).double().mean() <= 0.02)
    return alike(codes, expected)


def same(attn: HashAttention, q: Tensor, cache: KVCache, fresh: KVCache, most: float, part: object, after: str) -> None:
    """A cache answers as a fresh one of the same keys."""
    if attn.encoder is not None and attn.index is not None:
        codes, expected = cache.codes, fresh.codes
        promise(close_codes(codes, expected, attn.encoder.code), part, f"{after}, codes are those of a fresh cache")
        if not torch.equal(codes, expected) or not attn.index.scans:
            return
    found, expected = attn(q, cache), attn(q, fresh)
    promise(near(found, expected, most), part, f"{after}, attention is that of a fresh cache")


def _check_outputs(attn: HashAttention, shape: Shape, part: object) -> None:
    for dtype in DTYPES:
        for tokens in (1, 3):
            data = inputs(shape, attn, tokens=tokens, dtype=dtype)
            held = [x.clone() for x in (data.q, data.k, data.v)]
            out = attn(data.q, data.k, data.v, start=data.start)
            promise(out.shape == data.q.shape, part, f"output has the shape of the queries, got {[*out.shape]}")
            promise(out.dtype == dtype, part, f"output of {dtype} has that dtype, got {out.dtype}")
            promise(out.device == data.q.device, part, f"output is on {data.q.device}, got {out.device}")
            promise(out.isfinite(), part, f"output of {dtype} is finite")
            unchanged = all(map(torch.equal, held, (data.q, data.k, data.v)))
            promise(unchanged, part, "queries, keys and values are not written to")
    data = inputs(shape, attn)
    found, cached = attn(data.q, data.k, data.v, start=data.start), attn(data.q, filled(attn, data))
    promise(torch.equal(found, cached), part, "a stateless call answers as one with a cache")
    if shape.device == "cpu" and attn.attend.needs_selection and (attn.index is None or attn.index.scans):
        other = attn.replace(engine="cpu")(data.q, data.k, data.v, start=data.start)
        promise(near(found, other, 2 * data.rounding), part, 'engine="cpu" answers as engine="reference"')


def _check_rows(attn: HashAttention, data: Inputs, part: object) -> None:
    first = int(data.start[1])
    padding = (torch.arange(data.k.shape[2]) < data.start[:, None])[:, None, :, None].to(data.k.device)
    k, v = (x.masked_fill(padding, torch.nan) for x in (data.k, data.v))
    cache = filled(attn, Inputs(data.q, k, v, data.start))
    found = attn(data.q, cache)
    promise(found.isfinite(), part, "padding is never read")
    alone = Inputs(data.q[1:], data.k[1:, :, first:], data.v[1:, :, first:], torch.tensor([0]))
    single = filled(attn, alone)
    expected = attn(alone.q, single)
    if attn.encoder is not None and attn.index is not None and attn.index.new_store().per_key:
        own = cache.codes[1:, :, first:]
        unchanged = close_codes(own, single.codes, attn.encoder.code)
        promise(unchanged, part, "padding and batch mates leave a row's codes alone")
        if not torch.equal(own, single.codes) or not attn.index.scans:
            return
    promise(near(found[1:], expected, 2 * data.rounding), part, "padding and batch mates leave a row's output alone")


def _check_life(attn: HashAttention, data: Inputs, part: object) -> None:
    k, v, keys, most = data.k, data.v, data.k.shape[2], 2 * data.rounding
    for capacity in (None, keys + 5):
        cache = empty(attn, data, capacity)
        for i, (first, end) in enumerate(((0, keys - 30), (keys - 30, keys - 29), (keys - 29, keys))):
            cache.append(k[:, :, first:end], v[:, :, first:end], start=data.start if i == 0 else None)
            cache.encode()
        same(attn, data.q, cache, filled(attn, data), most, part, "after appends in chunks")
    changes: dict[str, Callable[[KVCache], None]] = {
        "after a crop and an append": lambda c: _crop(c, k, v, keys - 13),
        "after reorder()": lambda c: c.reorder(torch.tensor([1, 0])),
        "after select_rows() with a repeated row": lambda c: c.select_rows(torch.tensor([1, 0, 1])),
    }
    rows = {"after reorder()": [1, 0], "after select_rows() with a repeated row": [1, 0, 1]}
    for after, change in changes.items():
        cache, picked = filled(attn, data), rows.get(after, [0, 1])
        cache.encode()
        change(cache)
        fresh = filled(attn, Inputs(data.q, k[picked], v[picked], data.start[picked]))
        same(attn, data.q[picked], cache, fresh, most, part, after)
    cache, loaded = filled(attn, data), filled(attn, data)
    cache.encode()
    twin = copy.deepcopy(cache)
    loaded.load_state_dict(cache.state_dict())
    cache.crop(20)
    for after, other in (("in a copy", twin), ("in a cache that was saved and loaded", loaded)):
        same(attn, data.q, other, filled(attn, data), most, part, after)


def _crop(cache: KVCache, k: Tensor, v: Tensor, length: int) -> None:
    cache.crop(length)
    cache.encode()
    cache.append(k[:, :, length:], v[:, :, length:])


def _check_refusal(attn: HashAttention, data: Inputs, part: object) -> None:
    cache = filled(attn, data)
    wrong = data.k[:, :, :, :-1]
    try:
        cache.append(wrong, wrong)
    except ValueError:
        same(attn, data.q, cache, filled(attn, data), 2 * data.rounding, part, "after a refused append")
        return
    raise AssertionError(f"{part!r} breaks the contract: keys of another head_dim are refused")
