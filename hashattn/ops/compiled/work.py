"""The memory that a thread's compiled steps write on the way, kept from one to the next."""

from __future__ import annotations

import threading

import numpy as np

from hashattn.ops.compiled.loops import Work
from hashattn.ops.compiled.scan import BLOCK
from hashattn.ops.scratch import borrow

_ASIDE = 144  # bytes beyond the distances that are written, or read, with them


class _Held(threading.local):
    sizes: tuple[int, ...] = ()
    work: Work | None = None


_HELD = _Held()


def work_for(group: int, dim: int, query: int, bits: int, slots: int, length: int) -> Work:
    """Room for steps of `group` heads at once over so many columns; this thread's until it asks again.

    Args:
        query: words of a packed query; slots: keys that a choice keeps, at most.
    """
    bits = -(-bits // 64) * 64
    kind, work = (group, dim, query, bits), _HELD.work
    if work is None or _HELD.sizes != kind or len(work.near) < length + _ASIDE or len(work.ids) < slots + 8:
        slots, near = slots + slots // 4 + 8, length + length // 4 + _ASIDE
        floats = borrow("step floats", (bits + 2 * group * dim + group * slots,), np.float32)
        q, out, logits = np.split(floats[bits:], [group * dim, 2 * group * dim])
        ids, nearer = borrow("step ids", (2, slots), np.int32)
        own = borrow("step query", (group * query,), np.uint64)
        near_, sums = borrow("step near", (near,), np.uint8), borrow("step sums", (BLOCK,), np.uint16)
        work = Work(near_, sums, floats[:bits], own, q, out, logits.reshape(group, slots), ids, nearer)
        _HELD.sizes, _HELD.work = kind, work
    return work
