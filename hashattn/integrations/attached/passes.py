"""Pass: one forward pass of an attached model. Passes: those that are under way, each in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from hashattn.core.guard import Guard
from hashattn.core.types import Step
from hashattn.integrations.attached.layers import ServedLayer
from hashattn.integrations.attached.mask import Rows, read_mask, read_padding
from hashattn.integrations.attached.simulate import QueryBlock
from hashattn.ops.decode import Scratch


class Beginning(Protocol):
    """What the layers of a cache held."""

    def restore(self) -> list[int]:
        """Put the layers back, in place; returns the numbers of those that have written over what they held."""


@dataclass(eq=False)
class Pass:
    """What the layers tell each other in one forward pass. Nothing of it outlives the pass.

    Attributes:
        served: what serves the layers, as it was when the pass began.
        depth: only layers before this one run (early exit); None if not known.
        mask: the attention mask that the model was given: [B, N], or one that it takes as it is.
        why_dense: why none of its layers searches; None if they do as their compositions say.
        checked: whether what can be refused has been looked at.
        mask_checked: whether `mask` has been.
        interrupted: whether another call has used its cache meanwhile.
        beginning: what the layers of its cache held when it began.
        scratch: memory of the cache's layers.
        step: what the layer before chose.
        blocks: the same of a simulated call.
    """

    served: dict[int, ServedLayer]
    depth: int | None = None
    mask: object = None
    why_dense: str | None = None
    checked: bool = False
    mask_checked: bool = False
    interrupted: bool = False
    beginning: Beginning | None = None
    scratch: Scratch = field(default_factory=Scratch)
    step: Step = field(default_factory=Step)
    blocks: list[QueryBlock] = field(default_factory=list)
    _cache: weakref.ref[object] | None = None
    _rows: tuple[Tensor, int, Rows] | None = None
    _last_rows: tuple[Tensor, Rows] | None = None

    @property
    def running(self) -> dict[int, ServedLayer]:
        """What serves the layers that run."""
        return {i: served for i, served in self.served.items() if self.depth is None or i < self.depth}

    @property
    def cache(self) -> object | None:
        """The cache that it uses."""
        return self._cache() if self._cache is not None else None

    def use(self, cache: object, scratch: Scratch | None) -> None:
        """Take a cache, whose layers share memory that steps write: it belongs to the cache, as a graph's does.

        Args:
            scratch: what the cache has of it; None for a new one.
        """
        self._cache = weakref.ref(cache)
        self.scratch = scratch if scratch is not None else self.scratch

    def rows(self, mask: Tensor | None, batch: int, keys: int, tokens: int) -> Rows:
        """What a layer's mask says of the rows; read once for all layers it is given to."""
        if mask is None:
            return [0] * batch, None
        if self._rows is None or self._rows[0] is not mask or self._rows[1] != keys:
            self._rows = mask, keys, read_mask(mask, batch, keys, tokens)
        return self._rows[2]

    def last_rows(self, mask: Tensor, batch: int, keys: int) -> Rows:
        """What a layer's mask says of the rows to its last query."""
        if self._last_rows is None or self._last_rows[0] is not mask:  # the mask of a long prompt is large
            self._last_rows = mask, read_mask(mask[:, :, -1:], batch, keys, 1)
        return self._last_rows[1]

    def why_not_mask(self, batch: int, keys: int, tokens: int) -> str | None:
        """Why the mask that the model was given cannot be served; None also where only a layer's mask will tell."""
        mask = self.mask
        self.mask_checked = mask is None or (isinstance(mask, Tensor) and mask.ndim in (2, 4))
        if not isinstance(mask, Tensor) or not self.mask_checked:
            return None
        read = read_padding(mask, batch, keys) if mask.ndim == 2 else read_mask(mask, batch, keys, tokens)
        return read[1]


class Passes:
    """The passes of one attached model. A copy has none."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._users: weakref.WeakKeyDictionary[object, threading.Thread] = weakref.WeakKeyDictionary()
        self._guard = Guard()

    def current(self) -> Pass | None:
        """The innermost one of this thread."""
        stack = self._stack
        return stack[-1] if stack else None

    @property
    def why_dense(self) -> str | None:
        """Why no pass of this thread searches just now; None if they do."""
        found: str | None = getattr(self._mine, "why_dense", None)
        return found

    @contextlib.contextmanager
    def densely(self, why: str) -> Iterator[None]:
        """While open, no pass that this thread begins searches."""
        before, self._mine.why_dense = self.why_dense, why
        try:
            yield
        finally:
            self._mine.why_dense = before

    def open(self, one: Pass) -> None:
        """Begin a pass, inside of what this thread has under way."""
        one.why_dense = self.why_dense
        self._stack.append(one)

    def claim(self, one: Pass, cache: object, scratch: Scratch | None) -> None:
        """Let a pass have a cache to itself; see :meth:`Pass.use`.

        Raises:
            RuntimeError: another thread's pass uses it.
        """
        me = threading.current_thread()
        with self._guard:
            user = self._users.get(cache)
            if user is not None and user is not me and user.is_alive():
                raise RuntimeError(
                    f"this cache is in use by a call of the model in thread {user.name!r}: "
                    "give each thread that generates a cache of its own"
                )
            self._users[cache] = me
        for other in self._stack:  # a call inside of a call, or one that was broken off
            other.interrupted |= other is not one and other.cache is cache
        one.use(cache, scratch)

    def close(self) -> None:
        """End the innermost pass of this thread, if there is one."""
        if not self._stack:
            return
        cache = self._stack.pop().cache
        with self._guard:
            if cache is not None and self._users.get(cache) is threading.current_thread():
                del self._users[cache]

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()

    @property
    def _stack(self) -> list[Pass]:
        if not hasattr(self._mine, "stack"):
            self._mine.stack = []
        stack: list[Pass] = self._mine.stack
        return stack
