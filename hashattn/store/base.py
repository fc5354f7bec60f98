"""What a store of keys and values is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class KVStore(ABC):
    """Keys and values [B, Hkv, N, D] of one layer, which a KVCache appends, crops and reorders.

    A step reads rows by their columns; dense attention reads all of them, a chunk at a time. Only a store that keeps
    them in one piece (Resident) has storage that the fused steps on a GPU can point to.
    """

    in_one_piece: bool = False

    @property
    def wants_grad(self) -> bool:
        """Whether gradients go on to keys or values of the last append, if any arrive."""
        return False

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

    def expect(self, k: Tensor, v: Tensor) -> None:
        """Append what a kernel may write itself before anyone else looks: see `coming`. After an error as before."""
        self.append(k, v)

    @property
    def coming(self) -> tuple[Tensor, Tensor] | None:
        """The newest keys and values, [B, Hkv, n, D] each, if they are counted but not written yet."""
        return None

    def wrote(self) -> None:
        """What was coming is written."""
        assert self.coming is None  # a store that lets kernels write says so

    def settle(self) -> None:
        """Write what is still coming."""
        assert self.coming is None

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where keys and values lie, written or not; only of a store that has them in one piece."""
        return tuple(self.storage(what).data_ptr() for what in ("keys", "values"))

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

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Write columns over others of the same row, int64 [B, n]; all are read before any is written."""
        raise TypeError(f"a {type(self).__name__} moves no columns")

    @abstractmethod
    def clear_before(self, row: int, column: int) -> None:
        """Make the columns of a row before this one zeros: padding."""

    def selected(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values at columns ids [B, H, T, K]: two tensors [B, heads, n, D], and the ids of theirs there."""
        slots = torch.arange(ids.shape[2] * ids.shape[3], dtype=ids.dtype, device=ids.device).view(*ids.shape[2:])
        keys, values = (self.rows(what, ids).flatten(2, 3) for what in ("keys", "values"))
        return keys, values, torch.where(ids < 0, -1, slots)

    def whole(self, what: str) -> Tensor:
        """All of "keys" or "values", [B, Hkv, N, D]."""
        return torch.cat([keys if what == "keys" else values for keys, values in self.dense_chunks()], 2)

    def newest(self, first: int) -> Tensor:
        """The keys from column `first` on, [B, Hkv, n, D], without gradients."""
        return self.whole("keys")[:, :, first:].detach()

    def storage(self, what: str) -> Tensor:
        """All that is allocated for "keys" or "values" in one piece, [B, Hkv, room, D].

        Raises:
            ValueError: they are not in one piece.
        """
        raise ValueError(f"{type(self).__name__} keeps {what} in pieces, which this step cannot read")

    def adopt(self, length: int) -> None:
        """Count columns that a kernel wrote in place, up to `length`; only where there is storage."""
        self.storage("keys")

    def clear_unseen(self, starts: Sequence[int]) -> None:
        """Make zeros of what is not finite before these columns of the rows, and in the free columns; likewise."""
        self.storage("keys")
