"""What every index promises."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.encoders import Encoder
from hashattn.index import FlatHamming, Index
from hashattn.selectors import Recent, Sink, TopK
from hashattn.testing.attention import check_attention, empty, filled
from hashattn.testing.inputs import DTYPES, Inputs, Shape, inputs
from hashattn.testing.promise import check_description, promise


def check_index(index: Index, encoder: Encoder, *, approximate: bool = False, shape: Shape | None = None) -> None:
    """It holds what is added, finds the nearest of what a query sees, and survives what caches do to it.

    An index that scans finds exactly the k smallest distances, integer ones with ties to the most recent key.

    Args:
        index: the index.
        encoder: that makes what it holds; fitted to keys of this shape if it is to be.
        approximate: whether what is found may depend on how keys came (a graph).
        shape: of the inputs.

    Raises:
        AssertionError: it breaks a promise.
    """
    promise(isinstance(index, Index), index, "it is a hashattn.Index")
    shape = shape or Shape()
    check_description(index)
    promise(index.accepts(encoder.code), index, f"it accepts {encoder.code!r} codes, which {encoder!r} makes")
    promise(not index.accepts("none of the kinds"), index, "it accepts no kind of code that it does not know")
    attn = HashAttention(encoder, index, Sink(2) | Recent(4) | TopK(k=12), engine="reference")
    data = inputs(shape, attn)
    _check_store(index, encoder, data)
    for dtype in DTYPES:
        converted = inputs(shape, attn, dtype=dtype)
        _check_search(index, encoder.encode_query(converted.q), filled(attn, converted), converted)
    if not approximate:
        _check_life(attn, data)
    check_attention(attn, shape=shape, part=index)


def _check_store(index: Index, encoder: Encoder, data: Inputs) -> None:
    codes, keys = encoder.encode_key(data.k), data.k.shape[2]
    query = encoder.encode_query(data.q)
    promise(index.key_bytes(8) >= 0 <= index.read_bytes(8), index, "it tells its bytes")
    for capacity in (None, keys):
        store = index.new_store(capacity)
        promise(len(store) == 0, index, "a new store is empty")
        for end, part in ((40, codes[:, :, :40]), (41, codes[:, :, 40:41]), (keys, codes[:, :, 41:])):
            store.add(part)
            promise(len(store) == end, index, f"a store of {end} keys has that length, got {len(store)}")
        promise(store.nbytes > 0, index, "a store tells the bytes that it allocated")
        store.truncate(keys - 9)
        promise(
            len(store) <= keys - 9, index, f"after a crop to {keys - 9} keys a store holds no more, got {len(store)}"
        )
        store.add(codes[:, :, len(store) :])
        spans = [[(0, keys)] * data.q.shape[2]] * 2
        try:
            if index.scans:
                index.search(store, query, 1, spans)
            else:
                index.distances(store, query)
        except TypeError:
            continue
        raise AssertionError(f"{index!r} breaks the contract: what it cannot do (scans={index.scans}) is a TypeError")


def _check_search(index: Index, query: Tensor, cache: KVCache, data: Inputs) -> None:
    keys, tokens = data.k.shape[2], data.q.shape[2]
    view = cache.view(query, data.q.shape[1], cache.spans(tokens))
    if index.scans:
        distances = view.raw
        shape = (*data.q.shape[:3], keys)
        promise(distances.shape == shape, index, f"distances are [B, Hq, T, N] = {shape}, got {[*distances.shape]}")
        numbers = (torch.int32, torch.float32)
        promise(distances.dtype in numbers, index, f"distances are int32 or float32, got {distances.dtype}")
        seen = view.seen.expand(shape)
        promise(distances.masked_fill(~seen, 0).isfinite(), index, "distances of visible keys are finite")
    for k in (1, 9, keys + 5):
        ids, near = cache.search(query, k)
        for found, causal in ((view.search(k), True), (ids, False)):
            spans = torch.tensor(cache.spans(tokens, causal), device=found.device)
            _check_ids(index, found, min(k, keys), spans)
        near = near.double().masked_fill(ids < 0, torch.inf)
        promise(near.diff(dim=-1).nan_to_num() >= 0, index, "what is found comes nearest first, empty slots last")
        if index.scans:
            _check_nearest(index, ids, view.raw, data.start)
        elif query.dtype == torch.int64:
            exact = FlatHamming().distances(cache.indexed.store, query).gather(-1, ids.clamp(min=0).long())  # type: ignore[arg-type]
            promise((exact == near) | (ids < 0), index, "distances that it tells are those of the codes")


def _check_ids(index: Index, ids: Tensor, k: int, visible: Tensor) -> None:
    promise(ids.dtype == torch.int32, index, f"ids are int32, got {ids.dtype}")
    promise(ids.shape[-1] <= k, index, f"no more than k = {k} keys are found, got {ids.shape[-1]}")
    first, end = (x[:, None, :, None] for x in visible.unbind(-1))
    inside = (ids >= first) & (ids < end)
    promise(inside | (ids == -1), index, "only visible keys are found, -1 in empty slots")
    ordered = ids.sort(-1).values
    promise((ordered.diff(dim=-1) > 0) | (ordered[..., 1:] < 0), index, "no key is found twice")


def _check_nearest(index: Index, ids: Tensor, distances: Tensor, start: Tensor) -> None:
    keys = distances.shape[-1]
    column = torch.arange(keys, device=ids.device)
    hidden = column < start.to(ids.device)[:, None, None, None]
    exact = not distances.is_floating_point()
    rank = distances.double() * keys + (keys - 1 - column) if exact else distances.double()
    best = rank.masked_fill(hidden, torch.inf).sort(-1).values[..., : ids.shape[-1]]
    own = rank.gather(-1, ids.clamp(min=0).long()).masked_fill(ids < 0, torch.inf)
    rule = "the k smallest distances are found, ties to the most recent key" if exact else "the k smallest are found"
    promise(torch.equal(own, best), index, rule)


def _check_life(attn: HashAttention, data: Inputs) -> None:
    """Search of caches that were changed, where attention is not compared because an index only searches."""
    keys, query, index = data.k.shape[2], attn.encoder.encode_query(data.q), attn.index  # type: ignore[union-attr]
    chunked, cropped, turned = (empty(attn, data) for _ in range(3))
    for cache, parts in ((chunked, (keys - 20, 1, 19)), (cropped, (keys,)), (turned, (keys,))):
        first = 0
        for i, size in enumerate(parts):
            part = slice(first, first + size)
            cache.append(data.k[:, :, part], data.v[:, :, part], start=data.start if i == 0 else None)
            cache.search(query, 9)
            first += size
    cropped.crop(keys - 9)
    cropped.search(query, 9)
    cropped.append(data.k[:, :, keys - 9 :], data.v[:, :, keys - 9 :])
    for _ in range(2):
        turned.reorder(torch.tensor([1, 0]))
        turned.search(query, 9)
    fresh = filled(attn, data)
    ids, near = fresh.search(query, 9)
    for after, cache in (("in chunks", chunked), ("after a crop", cropped), ("after reorder()", turned)):
        if not torch.equal(cache.codes, fresh.codes):
            continue  # by the rounding of codes
        found, distances = cache.search(query, 9)
        same = torch.equal(distances, near) and torch.equal(found < 0, ids < 0)
        promise(same, index, f"keys that were added {after} are found as those of a fresh store are")
