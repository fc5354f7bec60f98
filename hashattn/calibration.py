"""Calibration: what DASH-KV fits beside its encoders, read from a composition and put into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hashattn.attend import MixedPrecision, PerLayerAttend
from hashattn.attention import HashAttention
from hashattn.selectors import Consensus, Momentum, Selector
from hashattn.selectors.base import Joined


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fitted discounts and estimates of DASH-KV (arXiv 2604.19351).

    Attributes:
        consensus: discount of keys that many heads select, in the index's units of distance; None if not fitted.
        momentum: discount of keys that the layer before attended to; likewise.
        mixed: {layer: MixedPrecision}, the scale and the residual of medium keys' logits.
    """

    consensus: float | None = None
    momentum: float | None = None
    mixed: Mapping[int, MixedPrecision] = field(default_factory=dict)

    @classmethod
    def of(cls, attn: HashAttention) -> Calibration:
        """What a composition holds of it; a MixedPrecision that serves all layers counts as not fitted."""
        found: dict[str, float] = {}
        for part in _nested(attn.selector):
            if isinstance(part, Consensus | Momentum):
                found[type(part).__name__.lower()] = part.discount.item()
        mixed = {}
        if isinstance(attn.attend, PerLayerAttend):
            stages = {int(i): stage for i, stage in attn.attend.stages.items()}
            mixed = {i: stage for i, stage in stages.items() if isinstance(stage, MixedPrecision)}
        return cls(found.get("consensus"), found.get("momentum"), mixed)

    def apply(self, attn: HashAttention) -> HashAttention:
        """The composition with these values in the parts that it has; other parts stay as they are."""
        selector = None if attn.selector is None else self._discounted(attn.selector)
        mixed = self.mixed and isinstance(attn.attend, MixedPrecision)
        return attn.replace(selector=selector, attend=PerLayerAttend(self.mixed) if mixed else attn.attend)

    def _discounted(self, selector: Selector) -> Selector:
        if isinstance(selector, Joined):
            return Joined(tuple(self._discounted(part) for part in selector.parts))
        if isinstance(selector, Consensus):
            discount = selector.discount.item() if self.consensus is None else self.consensus
            return Consensus(self._discounted(selector.inner), vote_share=selector.vote_share, discount=discount)
        if isinstance(selector, Momentum):
            discount = selector.discount.item() if self.momentum is None else self.momentum
            return Momentum(self._discounted(selector.inner), ratio=selector.ratio, discount=discount)
        return selector


def _nested(selector: Selector | None) -> list[Selector]:
    """A selector, its parts and what is inside them."""
    if selector is None:
        return []
    inside = selector.parts if isinstance(selector, Joined) else (getattr(selector, "inner", None),)
    return [selector, *(found for part in inside for found in _nested(part))]
