"""What stages ask of each other before they work together: kinds of codes, not the classes that make them."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class MakesCodes(Protocol):
    """An encoder, to others: see :class:`hashattn.encoders.base.Encoder`."""

    @property
    def code(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def query_bits(self) -> int: ...
    @property
    def angular(self) -> bool: ...
    @property
    def biased(self) -> bool: ...
    def centre_of(self, k: Tensor) -> Tensor | None: ...
    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor: ...
    def encode_query(self, q: Tensor) -> Tensor: ...


class HoldsCodes(Protocol):
    """An index, likewise: see :class:`hashattn.index.base.Index`."""

    @property
    def flat_codes(self) -> bool: ...
    def new_store(self, capacity: int | None = None) -> Any: ...
    def distances(self, store: Any, query: Tensor, *, biased: bool = False) -> Tensor: ...


class Weighs(Protocol):
    """An attend stage, likewise: see :class:`hashattn.attend.base.Attend`."""

    @property
    def weighs_samples(self) -> bool: ...
