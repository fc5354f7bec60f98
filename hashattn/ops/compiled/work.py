"""The memory that a thread's compiled steps write on the way, kept from one to the next."""

from __future__ import annotations

import threading

import numpy as np

from hashattn.ops.compiled.places import AT_ONCE, Layer, Work
from hashattn.ops.compiled.scan import BLOCK
from hashattn.ops.scratch import borrow

_ASIDE = 144  # bytes beyond the distances that are written, or read, with them


class _Held(threading.local):
    sizes: tuple[int, ...] = ()
    work: Work | None = None
    layer: Layer | None = None


_HELD = _Held()


def work_for(group: int, dim: int, query: int, bits: int, widest: int, residual: int, slots: int, length: int) -> Work:
    """Room for steps of `group` heads at once over so many columns; this thread's until it asks again.

    Args:
        query: words of a packed query; slots: keys that a choice keeps, at most.
        widest, residual: numbers of a layer of the queries' map, and of a residual's hidden layer.
    """
    bits = -(-bits // 64) * 64
    kind, work = (group, dim, query, bits, widest, residual), _HELD.work
    if work is None or _HELD.sizes != kind or len(work.near) < length + _ASIDE or len(work.ids) < slots + 8:
        slots, near = slots + slots // 4 + 8, length + length // 4 + _ASIDE
        floats = borrow("step floats", (2 * group * dim + group * slots,), np.float32)
        q, out, logits = np.split(floats, [group * dim, 2 * group * dim])
        projected = borrow("step projected", (AT_ONCE, bits), np.float32)
        hidden = borrow("step hidden", (2, AT_ONCE, widest), np.float32)
        ids, nearer = borrow("step ids", (2, slots), np.int32)
        own = borrow("step query", (group * query,), np.uint64)
        near_, sums = borrow("step near", (near,), np.uint8), borrow("step sums", (BLOCK,), np.uint16)
        table = borrow("step table", (bits * 4 * residual,), np.float32)
        begun = borrow("step begun", (2, residual), np.float32)
        work = Work(
            near_, sums, projected, hidden, own, q, out, logits.reshape(group, slots), ids, nearer, table, begun
        )
        _HELD.sizes, _HELD.work = kind, work
    return work


def layer_for(choices: int, length: int) -> Layer:
    """Room, at least, for what so many choices share over so many columns; this thread's until it asks again."""
    layer = _HELD.layer
    if layer is None or len(layer.limits) < choices or len(layer.more) < length + _ASIDE:
        room = length + length // 4 + _ASIDE
        near, limits = borrow("layer near", (choices, room), np.uint8), borrow("layer limits", (choices, 3), np.int64)
        votes, more = borrow("layer keys", (2, room), np.uint8)
        layer = _HELD.layer = Layer(near, limits, votes, more, borrow("layer prior", (room,), np.float32))
    return layer
