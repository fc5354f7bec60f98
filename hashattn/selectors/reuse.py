"""Reuse: a layer keeps what the layer before kept."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.core.checks import check_int, keep_ints
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.selectors.base import Selector
from hashattn.selectors.candidates import check_inner
from hashattn.selectors.wrapper import Wrapper


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
        if self.every is not None:
            keep_ints(self, every=1)
        if self.layers is not None:
            if not isinstance(self.layers, tuple):
                raise ValueError(f"layers must be a tuple of layer numbers from 0, got {self.layers!r}")
            object.__setattr__(self, "layers", tuple(check_int("layers", i, 0) for i in self.layers))

    @property
    def follows(self) -> bool:
        return True

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
