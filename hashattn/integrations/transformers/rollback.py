"""What a cache held when a pass began, so that a call that is refused on the way leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticSlidingWindowLayer

from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.hybrid_layer import STATES


class Beginning:
    """The layers of a cache before a call of so many tokens.

    They are held by reference, but for the columns that a static window will let go of. Recurrent states are written
    over in place: they come back where they had taken in nothing yet.
    """

    def __init__(self, layers: list[Any], tokens: int) -> None:
        self._layers = layers
        self._held = [Held.of(layer, tokens) for layer in layers]

    def restore(self) -> list[int]:
        """Put the layers back, in place; returns the numbers of those that have written over what they held."""
        self._layers[:] = [held.layer for held in self._held]
        return [number for number, held in enumerate(self._held) if not held.restore()]


@dataclass(frozen=True, eq=False)
class Held:
    """A layer of a cache, and what it held.

    Attributes:
        filled: columns of a hashed layer.
        values: of its attributes; those of a hashed one's recurrent states alone. Numbers on a device are copied.
        states: recurrent ones, and how often each had been written to.
        gone: the first columns of the keys and values of a static window, which it will let go of.
    """

    layer: Any
    filled: int
    values: dict[str, Any]
    states: list[tuple[Tensor, int | None]]
    gone: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, layer: Any, tokens: int) -> Held:
        hashed = isinstance(layer, HashedLayer)
        if hashed and not layer.recurrent:  # columns are all that it holds
            return cls(layer, len(layer.kv) if layer.kv is not None else 0, {}, [], None)
        kept = {name: value for name, value in vars(layer).items() if not hashed or name in STATES}
        filled = len(layer.kv) if hashed and layer.kv is not None else 0
        values = {name: _kept(value) for name, value in kept.items()}
        states = [(x, _version(x)) for name in STATES for x in _tensors(kept.get(name))]
        gone = None
        if isinstance(layer, StaticSlidingWindowLayer) and layer.keys is not None and layer.values is not None:
            held = min(int(layer.get_seq_length()), layer.max_cache_len)
            lost = min(held, max(0, held + tokens - layer.max_cache_len))
            gone = layer.keys[:, :, :lost].clone(), layer.values[:, :, :lost].clone()
        return cls(layer, filled, values, states, gone)

    def restore(self) -> bool:
        """Whether the layer is what it was."""
        layer, used = self.layer, self.values.get("has_previous_state")
        fresh = used is not None and not any(used.values() if isinstance(used, Mapping) else [used])
        kept = fresh or all(v is not None and _version(x) == v for x, v in self.states)
        if self.gone is not None and int(layer.get_seq_length()) > self._seen:
            for held, gone in zip((layer.keys, layer.values), self.gone, strict=True):
                held.copy_(torch.cat([gone, held[:, :, : held.shape[2] - gone.shape[2]]], 2))
        for name, value in self.values.items():
            now = vars(layer)[name]
            if isinstance(value, Tensor) and isinstance(now, Tensor) and value.numel() == now.numel() == 1:
                now.copy_(value)  # a graph may point to it
            else:
                vars(layer)[name] = value
        return self._crop() and kept

    @property
    def _seen(self) -> int:
        """Tokens that a static window had taken in."""
        return int(self.values.get("cumulative_length_int", self.values.get("cumulative_length", 0)))

    def _crop(self) -> bool:
        layer = self.layer
        if not isinstance(layer, HashedLayer) or layer.kv is None:
            return True
        layer.sync()
        if not self.filled:
            HashedLayer.reset(layer) if layer.capacity is None else layer.kv.reset()
            return True
        try:
            if len(layer.kv) > self.filled:
                layer.kv.crop(self.filled)
        except ValueError:  # a selector that looks back has forgotten too much
            return False
        return True


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.clone()
    return dict(value) if isinstance(value, dict) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    yield from (x for x in (value.values() if isinstance(value, dict) else [value]) if isinstance(x, Tensor))


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
