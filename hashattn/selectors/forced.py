"""Sink and Recent: keys kept for their position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from hashattn.core.budget import clamped
from hashattn.core.checks import check_int
from hashattn.selectors.base import Forced


@dataclass(frozen=True)
class Sink(Forced):
    """The first `keys` visible keys of each row: attention sinks (StreamingLLM, arXiv 2309.17453)."""

    keys: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", check_int("Sink(keys)", self.keys, 1))

    @property
    def sinks(self) -> int:
        return clamped(self.keys)

    def settings(self) -> dict[str, Any]:
        return {"sinks": self.keys}

    def _made(self, **settings: Any) -> Self:
        return type(self)(settings["sinks"])


@dataclass(frozen=True)
class Recent(Forced):
    """The last `keys` visible keys of each query, its own among them: a sliding window."""

    keys: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", check_int("Recent(keys)", self.keys, 1))

    @property
    def recents(self) -> int:
        return clamped(self.keys)

    def settings(self) -> dict[str, Any]:
        return {"recent": self.keys}

    def _made(self, **settings: Any) -> Self:
        return type(self)(settings["recent"])
