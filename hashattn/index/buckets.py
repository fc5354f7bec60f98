"""BucketStore: packed codes, and hash tables over their bits as sorted arrays."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.core.buffer import TokenBuffer
from hashattn.core.lasting import lasting
from hashattn.index.base import Store
from hashattn.ops.hamming.reference import unpack_bits

_TAIL = 1024  # keys that may wait unsorted; or an eighth of those that are sorted


class BucketStore(Store):
    """Keeps the codes, the bucket of each key in each table, and the keys of each bucket next to each other.

    Args:
        tables, bits: L tables of K bits: bits l K to (l + 1) K of a code are its bucket in table l.
    """

    movable = False

    def __init__(self, tables: int, bits: int, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self._tables, self._bits = tables, bits
        self._buckets = TokenBuffer(capacity)  # int32 [B, H, N, L]
        self._sorted = 0  # of the first so many keys, the arrays below hold all
        self._order: Tensor | None = None  # int32 [B, H, L, S], columns by bucket, then age
        self._bounds: Tensor | None = None  # int32 [B, H, L, 2^K + 1], where each bucket begins

    @property
    def lists(self) -> int:
        """Rows times heads: each has tables of its own."""
        return self.codes.shape[0] * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        arrays = (x.numel() * x.element_size() for x in (self._order, self._bounds) if x is not None)
        return super().nbytes + self._buckets.nbytes + sum(arrays)

    def add(self, codes: Tensor) -> None:
        bits = unpack_bits(codes, self._tables * self._bits).unflatten(-1, (self._tables, self._bits))
        weights = 1 << torch.arange(self._bits, dtype=torch.int32, device=codes.device)
        self._buckets.append((bits * weights).sum(-1, dtype=torch.int32))
        super().add(codes)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._buckets.truncate(length)
        self._sorted = min(self._sorted, length)

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        self._buckets.select(rows)
        if self._order is not None and self._bounds is not None:
            self._order, self._bounds = self._order.index_select(0, rows), self._bounds.index_select(0, rows)

    def members(self, probes: Tensor) -> tuple[Tensor, Tensor]:
        """The keys in the buckets that queries probe, once for each bucket, in no promised order.

        Args:
            probes: int64 [B * H, n, L, P], no bucket of a table twice.

        Returns:
            numbers of queries in [B * H, n] and columns, int64 [entries].
        """
        if len(self) - self._sorted > max(_TAIL, self._sorted // 8):
            self._sort()
        old, new = self._of_sorted(probes), self._of_tail(probes)
        return torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])

    def _of_sorted(self, probes: Tensor) -> tuple[Tensor, Tensor]:
        if self._order is None or self._bounds is None or self._sorted == 0:
            return probes.new_empty(0), probes.new_empty(0)
        size = self._order.shape[-1]
        bounds = self._bounds.flatten(0, 1).long()[:, None].expand(-1, probes.shape[1], -1, -1)
        first = bounds.gather(-1, probes)
        counts = (bounds.gather(-1, probes + 1) - first).flatten()
        table = torch.arange(self.lists * self._tables, device=probes.device).view(-1, 1, self._tables, 1)
        offsets = (table * size + first).flatten()
        probe = torch.repeat_interleave(counts)  # each as often as its bucket has keys
        within = torch.arange(len(probe), device=probes.device) - (counts.cumsum(0) - counts)[probe]
        columns = self._order.flatten()[offsets[probe] + within].long()
        held = columns < self._sorted  # others were cropped
        return (probe // (probes.shape[2] * probes.shape[3]))[held], columns[held]

    def _of_tail(self, probes: Tensor) -> tuple[Tensor, Tensor]:
        tail = self._buckets.view[:, :, self._sorted :].flatten(0, 1).transpose(1, 2).long()  # [B * H, L, n]
        probed = torch.zeros(*probes.shape[:3], 1 << self._bits, dtype=torch.bool, device=probes.device)
        probed.scatter_(-1, probes, True)
        hit = probed.gather(-1, tail[:, None].expand(-1, probes.shape[1], -1, -1)).any(2).flatten(0, 1)
        row, column = hit.nonzero(as_tuple=True)
        return row, column + self._sorted

    @lasting
    def _sort(self) -> None:
        buckets = self._buckets.view.transpose(2, 3).contiguous()  # [B, H, L, N]
        ranked, order = buckets.sort(dim=-1, stable=True)
        edges = torch.arange((1 << self._bits) + 1, dtype=torch.int32, device=buckets.device)
        self._bounds = torch.searchsorted(ranked, edges.expand(*ranked.shape[:3], -1).contiguous(), out_int32=True)
        self._order, self._sorted = order.to(torch.int32), len(self)
