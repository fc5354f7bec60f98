"""TokenBuffer: a tensor that grows along its token axis without being copied at every append."""

from __future__ import annotations

from torch import Tensor


class TokenBuffer:
    """Rows of width X for every (batch, head), appended at the end: [B, H, length, X].

    Memory grows by a quarter when it runs out, so that n single appends copy O(n) rows in all. With a fixed
    capacity it is allocated once and never grows; the owner checks the room before it appends.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.length = 0
        self._data: Tensor | None = None

    @property
    def storage(self) -> Tensor:
        """The whole allocation, contiguous [B, H, room, X], of which `length` rows are filled."""
        if self._data is None:
            raise RuntimeError("nothing was appended yet")
        return self._data

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
        if self._data is None or self._data.shape[2] < length:
            room = self.capacity if self.capacity is not None else max(length + 64, length * 5 // 4)
            data = self._allocate(rows, rows.shape[0], room)
            if self._data is not None:
                data[:, :, : self.length] = self.view
            self._data = data
        self._data.narrow(2, self.length, rows.shape[2]).copy_(rows)
        self.length = length

    def adopt(self, length: int) -> None:
        """Count rows that were written into the storage, up to `length`."""
        if length > self.storage.shape[2]:
            raise ValueError(f"length must be at most the room of {self.storage.shape[2]}, got {length}")
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` rows; the memory stays."""
        self.length = min(length, self.length)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows of this int64 index, in its order; rows may repeat."""
        if self._data is not None:
            filled = self.view.index_select(0, rows)
            if self.capacity is not None and len(rows) == self._data.shape[0]:  # a graph may write there
                self.view.copy_(filled)
                return
            data = self._allocate(filled, filled.shape[0], self._data.shape[2])
            data[:, :, : self.length] = filled
            self._data = data

    def _allocate(self, like: Tensor, batch: int, room: int) -> Tensor:
        shape = (batch, like.shape[1], room, like.shape[3])
        # What has a capacity may be read in full under a mask, and 0 * NaN is NaN.
        return like.new_empty(shape) if self.capacity is None else like.new_zeros(shape)
