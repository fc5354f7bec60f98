"""Reuse: a layer keeps what the layer before kept."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.selectors.base import Selector
from hashattn.selectors.candidates import check_inner
from hashattn.selectors.wrapper import Wrapper
from hashattn.types import Selection, Step
from hashattn.view import View


@dataclass(frozen=True)
class Reuse(Wrapper):
    """`inner` chooses in some layers; those in between keep the same keys, and scan nothing.

    Neighbouring layers attend to much the same keys (TidalDecode, arXiv 2410.05076). Where the layer before ran dense,
    and in a stateless call, there is nothing to reuse and `inner` chooses. Keys are encoded in every layer all the
    same, when the layer first decodes: any of them may have to search.

    Args:
        inner: a selector without weights that samples nothing.
        every: layers 0, every, 2 every, ... choose; or
        layers: these choose. Exactly one of the two is given.
    """

    inner: Selector
    every: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_inner("Reuse", self.inner)
        if (self.every is None) == (self.layers is None):
            raise ValueError(f"Reuse takes either every or layers, got every={self.every!r} and layers={self.layers!r}")
        if self.every is not None and (not _count(self.every) or self.every < 1):
            raise ValueError(f"every must be an int of at least 1, got {self.every!r}")
        if self.layers is not None and not (isinstance(self.layers, tuple) and all(map(_count, self.layers))):
            raise ValueError(f"layers must be a tuple of layer numbers from 0, got {self.layers!r}")

    def chooses(self, layer: int) -> bool:
        """Whether this layer chooses for itself."""
        return layer % self.every == 0 if self.every is not None else layer in (self.layers or ())

    def select(self, view: View, step: Step) -> Selection:
        before = step.previous
        if before is None or self.chooses(step.layer) or not _fits(before, view):
            return self.inner.select(view, step)
        return before


def _fits(before: Selection, view: View) -> bool:
    batch, heads, tokens, _ = before.ids.shape
    return (batch, tokens) == (len(view.spans), len(view.spans[0])) and heads in (view.q_heads, view.kv_heads)


def _count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0
