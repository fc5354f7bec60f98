"""Scanning on the CPU: distances of a few heads at a time, in turn or ahead in other threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor

from hashattn.ops.hamming.cpu import as_bytes, hammings, merge_planes, sum_planes, weighted_distances
from hashattn.ops.nearest.cpu import IntArray, Table
from hashattn.ops.scratch import borrow
from hashattn.threads import ahead

AT_ONCE = 1 << 17  # distances held at a time: half a megabyte


@dataclass(frozen=True)
class Part:
    """Some heads of one row, and the columns that any of its queries sees."""

    row: int
    heads: slice
    low: int
    high: int


@dataclass(frozen=True)
class Scan:
    """Queries about to be compared with codes.

    Attributes:
        planes: uint8 [B, Hc, R * T * P, bytes]: what each head of codes is scanned with; R is G, or 1 where the group
            makes one choice.
        weights: of the P planes, falling to 1.
        codes: uint8 [B, Hc, N, bytes].
        parts: what is scanned, in order.
    """

    planes: IntArray
    weights: list[int]
    codes: IntArray
    parts: list[Part]

    @classmethod
    def of(cls, query: Tensor, codes: Tensor, spans: Table, shared: bool) -> Scan:
        """The scan of a search; see :func:`hashattn.ops.search.reference.search`."""
        heads, keys = codes.shape[1:3]
        planes, weights = query_planes(query, heads, shared)
        few = max(1, AT_ONCE * len(weights) // (keys * planes.shape[2]))
        parts = []
        for b, row in enumerate(spans):
            low, high = min(first for first, _ in row), max(end for _, end in row)
            if low < high:
                parts += [Part(b, slice(h, min(heads, h + few)), low, high) for h in range(0, heads, few)]
        return cls(planes, weights, as_bytes(codes), parts)

    @property
    def top(self) -> int:
        """No distance is larger."""
        return 8 * self.codes.shape[3] * sum(self.weights)

    def in_turn(self) -> Iterator[tuple[Part, IntArray]]:
        """Each part and its distances, int32 [h, R * T, n], which are good until the next."""
        for part in self.parts:
            distances = borrow("distances", self._shape(part, len(self.weights)), np.int32)
            weighted_distances(self._planes(part), self.weights, self._codes(part), distances)
            yield part, distances

    def ahead(self, threads: int) -> Iterator[tuple[Part, IntArray]]:
        """The same, with the parts that follow scanned by threads - 1 others."""
        largest = max((prod(self._shape(part)) for part in self.parts), default=0)
        buffers = [borrow(f"planes {i}", (largest,), np.int32) for i in range(threads + 1)]

        def scan(i: int) -> IntArray:
            part = self.parts[i]
            shape, codes = self._shape(part), self._codes(part)
            found = buffers[i % len(buffers)][: prod(shape)].reshape(shape)
            hammings(self._planes(part), codes if codes[0].flags.c_contiguous else codes.copy(), found)
            return found

        for part, found in zip(self.parts, ahead(scan, len(self.parts), threads), strict=True):
            if len(self.weights) == 1:
                yield part, found
                continue
            distances = borrow("distances", self._shape(part, len(self.weights)), np.int32)
            sum_planes(found.reshape(*distances.shape[:2], len(self.weights), -1), self.weights, distances)
            yield part, distances

    def _planes(self, part: Part) -> IntArray:
        return self.planes[part.row, part.heads]

    def _codes(self, part: Part) -> IntArray:
        return self.codes[part.row, part.heads, part.low : part.high]

    def _shape(self, part: Part, planes: int = 1) -> tuple[int, int, int]:
        return part.heads.stop - part.heads.start, self.planes.shape[2] // planes, part.high - part.low


def query_planes(query: Tensor, heads: int, shared: bool) -> tuple[IntArray, list[int]]:
    """The planes that each head of codes is scanned with, uint8 [B, Hc, R * T * P, bytes], and their weights."""
    batch, q_heads, tokens = query.shape[:3]
    words, group = query.shape[-1], q_heads // heads
    planes = query.numpy().reshape(batch, heads, group, tokens, -1, words)
    count = planes.shape[4]
    if not shared:
        rows = np.ascontiguousarray(planes[..., ::-1, :]).view(np.uint8)
        return rows.reshape(batch, heads, -1, 8 * words), [1 << j for j in reversed(range(count))]
    size = batch * heads * tokens * words * 8
    whole = planes.transpose(2, 4, 0, 1, 3, 5).tobytes()  # [G, b, B, Hc, T, W]
    numbers = [int.from_bytes(whole[i : i + size], "little") for i in range(0, len(whole), size)]
    merged = merge_planes([(1 << i % count, number) for i, number in enumerate(numbers)])
    rows = np.frombuffer(b"".join(number.to_bytes(size, "little") for _, number in merged), np.uint8)
    rows = rows.reshape(len(merged), batch, heads, tokens, 8 * words).transpose(1, 2, 3, 0, 4)
    return np.ascontiguousarray(rows).reshape(batch, heads, -1, 8 * words), [weight for weight, _ in merged]
