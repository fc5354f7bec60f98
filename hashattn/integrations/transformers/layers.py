"""What serves each layer of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hashattn.attend import DenseAttend
from hashattn.attention import HashAttention
from hashattn.core.naming import short
from hashattn.encoders import PerLayer
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.facts import facts_of
from hashattn.integrations.transformers.heads import heads

DENSE_LAYERS, DENSE_COMPOSITION = "dense_layers", "the composition attends densely"


@dataclass(frozen=True)
class Served:
    """One layer of an attached model.

    Attributes:
        composition: as the user gave it, for all layers or for this one.
        own: whether it was given for this layer alone; its dense_layers then say nothing.
        attn: the composition bound to the layer; None leaves the model's own cache layer where it is.
        dense: why the layer never searches; None if it does.
    """

    composition: HashAttention
    own: bool
    attn: HashAttention | None
    dense: str | None = None


def serve(composition: HashAttention, own: bool, module: nn.Module, number: int, depth: int) -> Served:
    """Bind a composition to a layer.

    Raises:
        ValueError: a part does not fit the layer's heads, or dense_layers names a layer that the model lacks.
        RuntimeError: an encoder that cannot encode before it is fitted.
    """
    for i in composition.dense_layers:
        if not -depth <= i < depth:
            raise ValueError(f"dense_layers names layer {i}, but the model has {depth} layers")
    reason = support.layer_dense_by_design(module, number)
    if reason is not None:
        return Served(composition, own, None, reason)
    if not own and number in {i % depth for i in composition.dense_layers}:
        reason = DENSE_LAYERS
    elif not composition.attend.needs_selection:
        reason = DENSE_COMPOSITION
    if reason is not None:  # still worth a cache that appends in place
        return Served(composition, own, HashAttention(attend=DenseAttend()), reason)
    attn = composition.layer(number)
    if attn.encoder is not None:
        attn.encoder.check_model(*heads(module))
        attn.encoder.check_fitted()
    support.check_engine(attn, module)
    return Served(composition, own, attn)


def check_facts(composition: HashAttention, model: nn.Module) -> None:
    """Raise ValueError if the composition's encoders were fitted to another model."""
    facts = composition.encoder.facts if isinstance(composition.encoder, PerLayer) else None
    if facts is None:
        return
    own = facts_of(model)
    if different := own.differences(facts):
        raise ValueError(
            f"the encoders were fitted to {facts.name} (there), which {type(model).__name__} {own.name} (here) is not: "
            f"{'; '.join(different)}"
        )


def numbers(name: str, chosen: Any, modules: Collection[int], depth: int) -> list[int]:
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


def overrides(
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
    return dict(zip(numbers("layers", [*layers], modules, depth), layers.values(), strict=True))
