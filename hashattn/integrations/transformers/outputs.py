"""Outputs: what a step of a model returns, told apart from the cache that it was called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from hashattn.integrations.attached.graph_capture import CannotCapture

CACHE = object()  # in the place of the cache among outputs


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a captured step returns: tensors that a replay writes over, and the cache it is called with."""

    kind: type
    names: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, output: Any, cache: Any) -> Outputs:
        """Of what a step returned that was called with this cache.

        Raises:
            CannotCapture: it is neither.
        """
        named = output if isinstance(output, ModelOutput) else dict(enumerate(output)) if type(output) is tuple else {}
        if not named:
            raise CannotCapture(f"it returns a {type(output).__name__}")
        for name, value in named.items():
            if value is not None and value is not cache and not isinstance(value, Tensor):
                raise CannotCapture(f"its output holds {name!r}, a {type(value).__name__}")
        values = tuple(CACHE if value is cache else value for value in named.values())
        return cls(type(output), tuple(map(str, named)), values)

    def given(self, cache: Any) -> Any:
        """The same for whoever called: tensors of their own."""
        values = [cache if x is CACHE else x.clone() if isinstance(x, Tensor) else x for x in self.values]
        return tuple(values) if self.kind is tuple else self.kind(**dict(zip(self.names, values, strict=True)))
