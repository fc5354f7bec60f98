"""Calibration: what DASH-KV fits beside its encoders, read from a composition and put into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hashattn.attend import MixedPrecision, PerLayerAttend
from hashattn.attention import HashAttention


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
        found = {} if attn.selector is None else attn.selector.settings()
        mixed = {}
        if isinstance(attn.attend, PerLayerAttend):
            stages = {int(i): stage for i, stage in attn.attend.stages.items()}
            mixed = {i: stage for i, stage in stages.items() if isinstance(stage, MixedPrecision)}
        return cls(found.get("consensus"), found.get("momentum"), mixed)

    def apply(self, attn: HashAttention) -> HashAttention:
        """The composition with these values in the parts that it has; other parts stay as they are."""
        selector = attn.selector
        if selector is not None:
            own, fitted = selector.settings(), {"consensus": self.consensus, "momentum": self.momentum}
            selector = selector.revised(**{name: x for name, x in fitted.items() if x is not None and name in own})
        mixed = self.mixed and isinstance(attn.attend, MixedPrecision)
        return attn.replace(selector=selector, attend=PerLayerAttend(self.mixed) if mixed else attn.attend)
