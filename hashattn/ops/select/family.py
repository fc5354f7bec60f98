"""Family: one way to score keys, as a specification and as the functions that a kernel scores them with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.request import KernelRequest


class Scores(NamedTuple):
    """What the kernel that scores keys is made of; see :func:`hashattn.ops.select.triton.scan`.

    Attributes:
        load: function in Triton, of the codes of a tile of keys and whatever of them serves all queries of a group.
        score: function in Triton, of what was loaded and one query: int32 or float32 distances of the tile.
        codes: the codes as these functions read them, contiguous.
        stride: elements of a KV head's codes.
        shape: three numbers that they are compiled for.
        tile: keys that they take at a time, a power of two.
        many: whether a thread takes all the registers that it wants.
    """

    load: Any
    score: Any
    codes: Tensor
    stride: int
    shape: tuple[int, int, int]
    tile: int
    many: bool = False


class Family(ABC):
    """A family of scores.

    Attributes:
        scores: its name, as an index says it.
    """

    scores: str

    @abstractmethod
    def why_not(self, request: KernelRequest) -> list[str]:
        """Why its kernel does not serve codes like these, and what would; [] if it does."""

    @abstractmethod
    def distances(self, x: Inputs, filled: int) -> Tensor:
        """The specification: int32 or float32 [B, Hq, T, filled], smaller is nearer."""

    @abstractmethod
    def in_triton(self, like: Inputs) -> Scores | None:
        """What a kernel scores such keys with; None where all that is kept is forced. Imports Triton."""
