"""What a store of keys and values is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor


class KVStore(ABC):
    """Keys and values [B, Hkv, N, D] of one layer, which a KVCache appends, crops and reorders.

    A step reads rows by their columns; dense attention reads all of them, a chunk at a time. What owns memory that
    kernels may point to (storage) says so; others answer with None and are read by their rows.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Columns that are filled."""

    @property
    @abstractmethod
    def kind(self) -> tuple[torch.dtype, torch.device] | None:
        """Type and device of what rows() returns; None before the first keys."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated."""

    @abstractmethod
    def append(self, k: Tensor, v: Tensor) -> None:
        """Append [B, Hkv, n, D] each. After an error it is as before."""

    @abstractmethod
    def rows(self, what: str, ids: Tensor) -> Tensor:
        """ "keys" or "values" at columns ids [B, H, T, K]: [B, H, T, K, D]; an empty slot (-1) reads any row."""

    @abstractmethod
    def dense_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All keys and values in order, [B, Hkv, n, D] at a time."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Keep the first `length` columns."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, int64 [n], in this order; rows may repeat."""

    @abstractmethod
    def clear_before(self, row: int, column: int) -> None:
        """Make the columns of a row before this one zeros: padding."""
