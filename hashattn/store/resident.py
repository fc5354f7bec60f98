"""Resident: keys and values in one piece of memory each, on the device that attends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hashattn.core.buffer import TokenBuffer
from hashattn.ops.attend import row_numbers
from hashattn.store.base import KVStore


class Resident(KVStore):
    """Contiguous [B, Hkv, room, D] of each, of which the first columns are filled.

    Args:
        capacity: fixed number of columns, allocated at once; None grows by a quarter when full.
    """

    in_one_piece = True

    def __init__(self, capacity: int | None = None) -> None:
        self._keys, self._values = TokenBuffer(capacity), TokenBuffer(capacity)
        self._coming: tuple[Tensor, Tensor, int] | None = None  # what is counted but not written, and where it belongs

    def __len__(self) -> int:
        return self._keys.length

    @property
    def keys(self) -> TokenBuffer:
        """Rows of keys. Who looks at them finds all of them written."""
        self.settle()
        return self._keys

    @property
    def values(self) -> TokenBuffer:
        """The same of values."""
        self.settle()
        return self._values

    @property
    def kind(self) -> tuple[torch.dtype, torch.device] | None:
        return None if self._keys.empty else (self._keys.storage.dtype, self._keys.storage.device)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def wants_grad(self) -> bool:
        """Whether gradients go on to keys or values of the last append, if any arrive."""
        return self._keys.wants_grad or self._values.wants_grad

    @property
    def addresses(self) -> tuple[int, ...]:
        return self._keys.storage.data_ptr(), self._values.storage.data_ptr()

    @property
    def coming(self) -> tuple[Tensor, Tensor] | None:
        return None if self._coming is None else self._coming[:2]

    def expect(self, k: Tensor, v: Tensor) -> None:
        if self._keys.empty or k.requires_grad or v.requires_grad:
            self.append(k, v)
            return
        self.settle()
        first, length = len(self), len(self) + k.shape[2]
        for buffer in (self._keys, self._values):
            buffer.reserve(length)
        self._coming = k, v, first
        self.adopt(length)

    def wrote(self) -> None:
        self._coming = None

    def settle(self) -> None:
        if self._coming is not None:
            (*new, first), self._coming = self._coming, None
            for buffer, rows in zip((self._keys, self._values), new, strict=True):
                buffer.storage.narrow(2, first, rows.shape[2]).copy_(rows)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return self.__dict__

    def append(self, k: Tensor, v: Tensor) -> None:
        before = len(self)
        try:
            self.keys.append(k)
            self.values.append(v)
        except BaseException:  # out of memory: as before
            self.keys.truncate(before)
            raise

    def rows(self, what: str, ids: Tensor) -> Tensor:
        return rows_of(self.storage(what), ids)

    def dense_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.storage("keys").narrow(2, 0, len(self)), self.storage("values").narrow(2, 0, len(self))

    def storage(self, what: str) -> Tensor:
        """All that is allocated for "keys" or "values", which kernels may point to; gradients go on from it."""
        return {"keys": self.keys, "values": self.values}[what].traced

    def selected(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.storage("keys"), self.storage("values"), ids

    def whole(self, what: str) -> Tensor:
        return self.storage(what).narrow(2, 0, len(self))

    def newest(self, first: int) -> Tensor:
        return self.keys.storage.narrow(2, first, len(self) - first)

    def adopt(self, length: int) -> None:
        """Count columns that a kernel wrote in place, up to `length`."""
        self._keys.adopt(length)
        self._values.adopt(length)

    def truncate(self, length: int) -> None:
        self.keys.truncate(length)
        self.values.truncate(length)

    def select_rows(self, rows: Tensor) -> None:
        self.keys.select(rows)
        self.values.select(rows)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        self.keys.move(sources, targets)
        self.values.move(sources, targets)

    def clear_before(self, row: int, column: int) -> None:
        self.keys.storage[row, :, :column] = 0
        self.values.storage[row, :, :column] = 0

    @torch.no_grad()
    def clear_unseen(self, starts: Sequence[int]) -> None:
        """Make zeros of what is not finite before these columns of the rows, and in the free columns."""
        for buffer in (self.keys, self.values):
            held = buffer.storage
            parts = [held[row, :, :first] for row, first in enumerate(starts) if first]
            for part in (*parts, held[:, :, len(self) :]):
                part.masked_fill_(~part.isfinite(), 0)


def rows_of(storage: Tensor, ids: Tensor) -> Tensor:
    """Rows of [B, heads, room, X] at columns ids [B, H, T, K]: [B, H, T, K, X].

    Empty slots (-1) read a row that is kept anyway, so that no padding is touched while anything is kept.
    """
    rows = row_numbers(ids, storage.shape[1], storage.shape[2])
    return storage.view(-1, storage.shape[-1]).index_select(0, rows).view(*ids.shape, -1)
