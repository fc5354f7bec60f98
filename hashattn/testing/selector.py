"""What every selector promises."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hashattn.attend import Attend, ExactAttend
from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import CRITICAL, Selection
from hashattn.encoders import Encoder, SimHash
from hashattn.index import FlatHamming, Index
from hashattn.selectors import Recent, Selector, Sink
from hashattn.selectors.base import Forced, Joined
from hashattn.testing.attention import check_attention, filled
from hashattn.testing.inputs import Inputs, Shape, attention64, inputs, visible
from hashattn.testing.promise import check_description, near, promise, reloaded


def check_selector(
    selector: Selector,
    *,
    whole: Selector | None = None,
    encoder: Encoder | None = None,
    index: Index | None = None,
    attend: Attend | None = None,
    shape: Shape | None = None,
) -> None:
    """It keeps visible keys, none twice, within its budget, and the same ones whatever else is in the batch.

    Args:
        selector: the selector, without a history: what it does in a first call is checked.
        whole: a selector like it that keeps every key, which must give full attention.
        encoder, index, attend: what it is composed with; SimHash(128, centring=None), FlatHamming() and ExactAttend()
            by default.
        shape: of the inputs.

    Raises:
        AssertionError: it breaks a promise.
    """
    promise(isinstance(selector, Selector), selector, "it is a hashattn.Selector")
    shape = shape or Shape()
    check_description(selector)
    attn = HashAttention(
        encoder or SimHash(128, centring=None),
        index or FlatHamming(),
        selector,
        attend or ExactAttend(),
        engine="reference",
    )
    data = inputs(shape, attn)
    for tokens in (1, 3):
        part = inputs(shape, attn, tokens=tokens)
        cache = filled(attn, part)
        found = chosen(attn, part.q, cache)
        _check_selection(selector, found, part)
        again = chosen(attn, part.q, filled(attn, part))
        promise(torch.equal(found.ids, again.ids), selector, "the same queries keep the same keys")
        if selector.accumulates:  # it has seen nothing yet
            attn.accumulate(data.q, cache)
            found = chosen(attn, part.q, cache)
            _check_selection(selector, found, part)
        _check_budget(selector, found, part)
    if not isinstance(selector, Forced | Joined):
        _check_forced(attn, selector, data)
    _check_independence(attn, selector, data)
    if isinstance(selector, nn.Module):
        twin = reloaded(selector)
        assert isinstance(twin, Selector)
        own, other = (chosen(attn.replace(selector=s), data.q, filled(attn, data)) for s in (selector, twin))
        promise(torch.equal(own.ids, other.ids), selector, "a state_dict that is loaded keeps the same keys")
    if whole is not None:
        out, full = attn.replace(selector=whole)(data.q, filled(attn, data)), attention64(data, visible(data))
        promise(near(out, full, data.rounding), whole, "a budget of everything is full attention")
    check_attention(attn, shape=shape, part=selector)


def chosen(attn: HashAttention, q: Tensor, cache: KVCache) -> Selection:
    """What a composition keeps in a call."""
    selection = attn.run(q, cache)[1]
    assert selection is not None
    return selection


def kept(ids: Tensor, keys: int, heads: int) -> Tensor:
    """bool [B, heads, T, N] of ids [B, H, T, K]."""
    mask = torch.zeros(*ids.shape[:3], keys + 1, dtype=torch.bool, device=ids.device)
    mask.scatter_(-1, ids.where(ids >= 0, keys).long(), True)
    return mask[..., :keys].repeat_interleave(heads // ids.shape[1], 1)


def _check_selection(selector: Selector, found: Selection, data: Inputs) -> None:
    ids, seen = found.ids, visible(data)
    q_heads, kv_heads, keys = data.q.shape[1], data.k.shape[1], data.k.shape[2]
    promise(ids.dtype == torch.int32 and ids.ndim == 4, selector, f"ids are int32 [B, H, T, K], got {ids.dtype}")
    shapes = [(2, heads, data.q.shape[2]) for heads in (q_heads, kv_heads)]
    promise(ids.shape[:3] in shapes, selector, f"ids are of Hq or Hkv heads, got {[*ids.shape]}")
    promise((ids >= -1) & (ids < keys), selector, f"ids are columns from 0 to {keys - 1}, or -1 in empty slots")
    mask = kept(ids, keys, ids.shape[1])
    promise(mask.sum(-1) == (ids >= 0).sum(-1), selector, "no key is kept twice by a query")
    promise(~mask | seen, selector, "only visible keys are kept: neither padding nor later ones")
    for name, dtype in (("tier", torch.int8), ("log_weights", torch.float32)):
        given = getattr(found, name)
        if given is not None:
            promise(given.shape == ids.shape and given.dtype == dtype, selector, f"{name} is {dtype}, shaped as ids")
            promise(given[ids >= 0].isfinite(), selector, f"{name} of kept keys is finite")
    if found.critical_slots is not None:
        late = _critical(found)[..., found.critical_slots :] & (ids[..., found.critical_slots :] >= 0)
        promise(~late, selector, f"no slot from critical_slots = {found.critical_slots} on is critical")


def _check_budget(selector: Selector, found: Selection, data: Inputs) -> None:
    times = selector.choices(data.q.shape[1], data.k.shape[1])[1]
    counts = visible(data).sum(-1)  # [B, 1, T]
    for words, most, filled_slots in (
        ("budget", selector.budget, found.count),
        ("critical", selector.critical, (_critical(found) & (found.ids >= 0)).sum(-1)),
    ):
        limit = torch.tensor([[[times * most(n) for n in row] for row in rows] for rows in counts.tolist()])
        most_kept = limit.to(found.ids.device)
        promise(filled_slots <= most_kept, selector, f"no query keeps more keys than its {words}() says")


def _critical(found: Selection) -> Tensor:
    return torch.ones_like(found.ids, dtype=torch.bool) if found.tier is None else found.tier == CRITICAL


def _check_forced(attn: HashAttention, selector: Selector, data: Inputs) -> None:
    joined = attn.replace(selector=Sink(2) | Recent(3) | selector)
    mask = kept(chosen(joined, data.q, filled(joined, data)).ids, data.k.shape[2], data.q.shape[1])
    seen = visible(data)
    place = seen.cumsum(-1)
    forced = seen & ((place <= 2) | (place > place[..., -1:] - 3))
    promise(mask | ~forced, selector, "forced keys are kept: sinks and recent ones of the view")


def _check_independence(attn: HashAttention, selector: Selector, data: Inputs) -> None:
    """Neither batch mates nor padding nor the queries beside it change what a query keeps."""
    keys, heads, first, tokens = data.k.shape[2], data.q.shape[1], int(data.start[1]), data.q.shape[2]
    mask = kept(chosen(attn, data.q, filled(attn, data)).ids, keys, heads)
    alone = Inputs(data.q[1:], data.k[1:, :, first:], data.v[1:, :, first:], torch.tensor([0]))
    own = kept(chosen(attn, alone.q, filled(attn, alone)).ids, keys - first, heads)
    promise(torch.equal(mask[1:, ..., first:], own), selector, "padding and batch mates do not change what is kept")
    if attn.index is not None and not attn.index.scans:
        return
    cache = None
    for t in range(tokens):
        end = keys - tokens + t + 1
        before = Inputs(data.q[:, :, t : t + 1], data.k[:, :, :end], data.v[:, :, :end], data.start)
        if cache is None or not selector.accumulates:
            cache = filled(attn, before)
        else:  # it goes by the queries before
            cache.append(data.k[:, :, end - 1 : end], data.v[:, :, end - 1 : end])
        single = kept(chosen(attn, before.q, cache).ids, end, heads)
        promise(torch.equal(mask[:, :, t : t + 1, :end], single), selector, "T queries keep what each keeps by itself")
