"""What ran, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hashattn.types import MEDIUM, Selection


@dataclass
class LayerRecord:
    """Counts of one layer, kept on the device until they are read.

    Attributes:
        sparse: calls that searched.
        dense: calls that attended densely, by reason.
        steps: one-token calls among both.
    """

    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    visible: int = 0  # (query head, key) pairs that one-token calls could have read
    kept: Tensor | int = 0  # pairs that they kept, of either tier
    scanned: int = 0  # bytes of codes that they scanned
    read: Tensor | int = 0  # bytes of keys, values, norms and codes that they attended to
    dense_bytes: int = 0  # bytes that full attention would have read
    code_bytes: int = 0  # memory of the last cache's codes
    kv_bytes: int = 0  # and of its keys and values
    reads: Tensor | None = None  # int64 [positions], how often a query head read each (when traced)

    def add_reads(self, ids: Tensor, weight: int, columns: int) -> None:
        """Count the columns in ids (-1 empty), `weight` query heads each."""
        counts = torch.bincount(ids[ids >= 0].long(), minlength=columns) * weight
        if self.reads is None:
            self.reads = counts
        else:
            longer, shorter = sorted((self.reads, counts), key=len, reverse=True)
            self.reads = longer.clone()
            self.reads[: len(shorter)] += shorter

    def add_step(
        self, selection: Selection | None, q_heads: int, kv_heads: int, keys: int, key_bytes: int, code_bytes: int
    ) -> None:
        """Count a one-token call.

        Args:
            selection: what was kept; None if the call ran dense.
            keys: visible keys, summed over rows.
            key_bytes: of one key.
            code_bytes: of one key's codes over all heads; 0 if none are scanned.
        """
        self.steps += 1
        self.visible += keys * q_heads
        self.dense_bytes += 2 * keys * kv_heads * key_bytes
        if selection is None:
            self.kept = self.kept + keys * q_heads
            self.read = self.read + 2 * keys * kv_heads * key_bytes
            return
        self.scanned += keys * code_bytes
        kept = selection.count.sum()
        self.kept = self.kept + kept * (q_heads // selection.ids.shape[1])
        self.read = self.read + kept * 2 * key_bytes
        if selection.tier is not None:  # a medium key costs a norm and a code instead of the key
            medium = ((selection.tier == MEDIUM) & (selection.ids >= 0)).sum()
            self.read = self.read - medium * (key_bytes - 2 - code_bytes // kv_heads)


@dataclass(frozen=True)
class LayerRow:
    """One line of a report."""

    layer: int
    sparse: int
    dense: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What an attached composition did. str(report) is a table.

    Attributes:
        layers: per layer, the calls that searched and those that attended densely, by reason.
        steps: one-token steps (decoded tokens, counted at the first layer that was called).
        keys_read: share of the visible keys that query heads read in one-token calls, dense layers included.
        sparse_keys_read: the same over the layers that searched.
        bytes_per_step: read of keys, values, codes and norms by one step over all layers, mean.
        dense_bytes_per_step: what full attention would have read.
        code_bytes: memory of codes, norms and centres of the last cache.
        kv_bytes: memory of its keys and values.
        refused: why the model was left as it is (only without strict).
    """

    layers: tuple[LayerRow, ...]
    steps: int
    keys_read: float
    sparse_keys_read: float
    bytes_per_step: float
    dense_bytes_per_step: float
    code_bytes: int
    kv_bytes: int
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.refused:
            return "nothing is served, the model runs as it is: " + "; ".join(self.refused)
        lines = ["layers    sparse calls  dense calls"]
        for first, last, row in _runs(self.layers):
            span = f"{first}" if first == last else f"{first}-{last}"
            dense = ", ".join(f"{n} ({why})" for why, n in row.dense.items()) or "0"
            lines.append(f"{span:<10}{row.sparse:<14}{dense}")
        if self.steps:
            lines += [
                f"{self.steps} one-token steps: {self.keys_read:.1%} of visible keys read "
                f"({self.sparse_keys_read:.1%} in the layers that searched)",
                f"{self.bytes_per_step / 1e6:.1f} MB read a step, full attention "
                f"{self.dense_bytes_per_step / 1e6:.1f} MB",
                f"codes take {self.code_bytes / 1e6:.1f} MB beside {self.kv_bytes / 1e6:.1f} MB of keys and values",
            ]
        return "\n".join(lines)


def _runs(rows: tuple[LayerRow, ...]) -> list[tuple[int, int, LayerRow]]:
    """Neighbouring layers that did the same, as (first, last, row)."""
    runs: list[tuple[int, int, LayerRow]] = []
    for row in rows:
        if runs and (runs[-1][2].sparse, runs[-1][2].dense) == (row.sparse, row.dense) and runs[-1][1] == row.layer - 1:
            runs[-1] = (runs[-1][0], row.layer, runs[-1][2])
        else:
            runs.append((row.layer, row.layer, row))
    return runs


def summarise(records: dict[int, LayerRecord], refused: tuple[str, ...]) -> Report:
    """Read the counters and make a report."""
    searched = [r for r in records.values() if r.sparse]
    steps = max((r.steps for r in records.values()), default=0)
    per = max(1, steps)
    return Report(
        tuple(LayerRow(i, r.sparse, dict(r.dense)) for i, r in records.items()),
        steps,
        _share(list(records.values())),
        _share(searched),
        sum(r.scanned + int(r.read) for r in records.values()) / per,
        sum(r.dense_bytes for r in records.values()) / per,
        sum(r.code_bytes for r in records.values()),
        sum(r.kv_bytes for r in records.values()),
        refused,
    )


def _share(records: list[LayerRecord]) -> float:
    return sum(int(r.kept) for r in records) / max(1, sum(r.visible for r in records))
