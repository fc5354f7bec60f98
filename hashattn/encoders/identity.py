"""Identity: the vectors themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.encoders.base import Encoder


@dataclass(frozen=True)
class Identity(Encoder):
    """No hashing: codes are the keys, queries stay as they are. With FlatDot it is the oracle that others aim at."""

    code = "vector"

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        return k

    def encode_query(self, q: Tensor) -> Tensor:
        return q
