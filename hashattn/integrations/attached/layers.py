"""What serves each layer of a model, and how layers are named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hashattn.attend import DenseAttend
from hashattn.attention import HashAttention
from hashattn.core.naming import short
from hashattn.integrations.attached.choice import why_never

DENSE_LAYERS, DENSE_COMPOSITION = "dense_layers", "the composition attends densely"


@dataclass(frozen=True)
class ServedLayer:
    """One layer of an attached model.

    Attributes:
        composition: as the user gave it, for all layers or for this one.
        own: whether it was given for this layer alone; its dense_layers then say nothing.
        attn: the composition bound to the layer; None leaves the model's own cache layer where it is.
        why_dense: why the layer never searches; None if it does, as far as its engine does.
    """

    composition: HashAttention
    own: bool
    attn: HashAttention | None
    why_dense: str | None = None

    @classmethod
    def bind(cls, composition: HashAttention, own: bool, number: int, depth: int, by_model: str | None) -> ServedLayer:
        """Bind a composition to a layer.

        Args:
            depth: layers of the model.
            by_model: why the model itself keeps the layer from a search over all keys; None if it does not.

        Raises:
            ValueError: dense_layers names a layer that the model lacks.
        """
        for i in composition.dense_layers:
            if not -depth <= i < depth:
                raise ValueError(f"dense_layers names layer {i}, but the model has {depth} layers")
        if by_model is not None:
            return cls(composition, own, None, by_model)
        reason = None
        if not own and number in {i % depth for i in composition.dense_layers}:
            reason = DENSE_LAYERS
        elif not composition.attend.needs_selection:
            reason = DENSE_COMPOSITION
        if reason is not None:  # still worth a cache that appends in place
            return cls(composition, own, HashAttention(attend=DenseAttend()), reason)
        return cls(composition, own, composition.layer(number))

    @property
    def why_never(self) -> str | None:
        """Why no call of the layer searches, its engine included; None if some may, so that their masks matter."""
        return self.why_dense if self.attn is None or self.why_dense is not None else why_never(self.attn)

    @property
    def accumulates(self) -> bool:
        """Whether its selector wants to see every query."""
        selector = self.attn.selector if self.attn is not None and self.why_dense is None else None
        return selector is not None and selector.accumulates


def layer_numbers(name: str, chosen: Any, modules: Collection[int], depth: int) -> list[int]:
    """Layer numbers, negative ones counted from the last, as numbers from 0.

    Args:
        modules: the layers that have attention.
        depth: of the model, with those that have none.

    Raises:
        TypeError: not a collection of ints.
        ValueError: a layer that the model lacks or that has no attention, or one named twice.
    """
    if not isinstance(chosen, Iterable) or not all(type(i) is int for i in chosen):
        raise TypeError(f"{name} must name layers by ints, got {chosen!r}")
    for i in chosen:
        if not -depth <= i < depth:
            raise ValueError(f"{name} names layer {i}, but the model has {depth} layers, 0 to {depth - 1}")
        if i % depth not in modules:
            raise ValueError(f"{name} names layer {i}, which has no attention; layers {sorted(modules)} have")
    found = [i % depth for i in chosen]
    if len(set(found)) < len(found):
        raise ValueError(f"{name} names a layer twice (negative numbers count from the last), got {[*chosen]}")
    return found


def layer_compositions(
    layers: Mapping[int, HashAttention] | None, modules: Collection[int], depth: int
) -> dict[int, HashAttention]:
    """The argument `layers` of attach, checked, with numbers from 0."""
    if layers is None:
        return {}
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must map layer numbers to compositions, got {short(layers)}")
    for i, composition in layers.items():
        if not isinstance(composition, HashAttention):
            raise TypeError(f"layers[{i}] must be a HashAttention, got {short(composition)}")
    return dict(zip(layer_numbers("layers", [*layers], modules, depth), layers.values(), strict=True))
