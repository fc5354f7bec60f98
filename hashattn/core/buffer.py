"""TokenBuffer: a tensor that grows along its token axis without being copied at every append."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hashattn.core.checks import check_int
from hashattn.core.lasting import lasting


class TokenBuffer:
    """Rows of width X for every (batch, head), appended at the end: [B, H, length, X].

    Memory grows by a quarter when it runs out, so that n single appends copy O(n) rows in all. With a fixed
    capacity it is allocated once and never grows; the owner checks the room before it appends.

    It holds numbers, not their history: of rows that carry gradients the last append's are remembered until the next
    change, and :attr:`traced` leads gradients back to them. Older rows are constants.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = None if capacity is None else check_int("capacity", capacity, 1)
        self.length = 0
        self._data: Tensor | None = None
        self._newest: tuple[Tensor, int] | None = None  # rows that carry gradients, and where they were appended

    @property
    def storage(self) -> Tensor:
        """The whole allocation, contiguous [B, H, room, X], of which `length` rows are filled; without gradients."""
        if self._data is None:
            raise RuntimeError("nothing was appended yet")
        return self._data

    @property
    def traced(self) -> Tensor:
        """The same memory; gradients that reach it go on to the rows of the last append."""
        if self._newest is None or not torch.is_grad_enabled():
            return self.storage
        traced: Tensor = _Appended.apply(self.storage, *self._newest)
        return traced

    @property
    def wants_grad(self) -> bool:
        """Whether gradients that reach it would go on."""
        return self._newest is not None and torch.is_grad_enabled()

    @property
    def view(self) -> Tensor:
        """The filled part, [B, H, length, X]: a view, not a copy."""
        return self.storage.narrow(2, 0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._data is None else self._data.numel() * self._data.element_size()

    @property
    def empty(self) -> bool:
        return self._data is None

    def append(self, rows: Tensor) -> None:
        """Append [B, H, n, X]."""
        length = self.length + rows.shape[2]
        data = self._data
        if data is None or data.shape[2] < length:
            data = self._grown(rows, length)
        data.narrow(2, self.length, rows.shape[2]).copy_(rows.detach())
        self._newest = (rows, self.length) if rows.requires_grad and torch.is_grad_enabled() else None
        self.length = length

    def reserve(self, length: int) -> None:
        """Make room for so many rows; some are there."""
        if self.storage.shape[2] < length:
            self._grown(self.storage, length)

    def adopt(self, length: int) -> None:
        """Count rows that were written into the storage, up to `length`."""
        if length > self.storage.shape[2]:
            raise ValueError(f"length must be at most the room of {self.storage.shape[2]}, got {length}")
        self.length = length
        self._newest = None

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` rows; the memory stays."""
        if length < self.length:
            self.length, self._newest = length, None

    @torch.no_grad()
    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Write rows over others of the same batch row, int64 [B, n]; all are read before any is written."""
        self._newest, data = None, self.storage
        read, written = (x[:, None, :, None].expand(-1, data.shape[1], -1, data.shape[3]) for x in (sources, targets))
        data.scatter_(2, written, data.gather(2, read))

    @lasting
    def select(self, rows: Tensor) -> None:
        """Keep the batch rows of this int64 index, in its order; rows may repeat."""
        self._newest = None
        if self._data is not None:
            filled = self.view.index_select(0, rows)
            if len(rows) == self._data.shape[0]:  # a graph may write there
                self.view.copy_(filled)
                return
            data = self._allocate(filled, filled.shape[0], self._data.shape[2])
            data[:, :, : self.length] = filled
            self._data = data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_newest": None}  # copies are numbers alone

    @lasting
    def _grown(self, like: Tensor, length: int) -> Tensor:
        room = self.capacity
        if room is None:
            room = -(-max(length + 64, length * 5 // 4) // 16) * 16  # kernels are compiled for numbers of this kind
        data = self._allocate(like, like.shape[0], room)
        if self._data is not None:
            data[:, :, : self.length] = self.view
        self._data = data
        return data

    def _allocate(self, like: Tensor, batch: int, room: int) -> Tensor:
        shape = (batch, like.shape[1], room, like.shape[3])
        # What has a capacity may be read in full under a mask, and 0 * NaN is NaN.
        return like.new_empty(shape) if self.capacity is None else like.new_zeros(shape)


class _Appended(torch.autograd.Function):
    """Storage as what was appended last made it: the same memory, with the gradients of those rows."""

    @staticmethod
    def forward(ctx: Any, storage: Tensor, rows: Tensor, first: int) -> Tensor:
        ctx.first, ctx.count = first, rows.shape[2]
        return storage.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, gradients[0].narrow(2, ctx.first, ctx.count), None
