"""What ran, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hashattn.integrations.attached.layer_counts import LayerCounts


@dataclass(frozen=True)
class LayerRow:
    """One line of a report.

    Attributes:
        layer: its number.
        sparse: calls that searched.
        dense: calls that attended densely, by reason.
        keys_read: share of the visible keys that query heads read in one-token calls; None without any, or where the
            layer keeps the model's own cache (a sliding window, a cache that is not served).
        bytes_per_step: read of keys, values, codes and norms by a one-token call, mean; None likewise.
        engine: of the last one-token call: "dense", "reference" or "cpu"; "" before the first.
        why: this engine.
        positions: queries of one-token calls and simulated ones, over rows.
        searched: of these, for which keys were ranked beyond the forced ones.
        keys_ranked: keys that a query head kept beyond the forced ones there, mean.
    """

    layer: int
    sparse: int
    dense: dict[str, int]
    keys_read: float | None
    bytes_per_step: float | None
    engine: str
    why: str
    positions: int = 0
    searched: int = 0
    keys_ranked: float = 0.0


@dataclass(frozen=True)
class GraphUse:
    """What graphs of a model's steps were used for.

    Attributes:
        replayed: calls that were replayed.
        captured: graphs that were captured, all in all.
        nbytes: memory that those take which are kept, beside the caches.
        largest: that the largest took.
        eager: calls of few tokens that ran as ever, by reason.
    """

    replayed: int
    captured: int
    nbytes: int
    largest: int
    eager: dict[str, int]

    @property
    def asked(self) -> bool:
        """Whether any call could have been replayed."""
        return bool(self.replayed or self.captured or self.eager)

    def __str__(self) -> str:
        eager = "".join(f"; {n} calls not ({why})" for why, n in self.eager.items())
        each, kept = f"{self.largest / 1e6:.1f} MB", f"{self.nbytes / 1e6:.1f} MB"
        size = f"{self.captured} captured, of up to {each} (those kept take {kept})"
        return f"graphs: {self.replayed} calls were replayed, {size}{eager}"


@dataclass(frozen=True)
class Report:
    """What an attached composition did. str(report) is a table.

    Attributes:
        layers: per layer, the calls that searched and those that attended densely, what they read, and the engine.
        steps: one-token steps (decoded tokens, counted at the first layer that was called).
        keys_read: share of the visible keys that query heads read in one-token calls, dense layers included.
        sparse_keys_read: the same over the layers that searched; 0 where none did.
        bytes_per_step: read of keys, values, codes and norms by one step over all layers, mean.
        dense_bytes_per_step: what full attention would have read.
        code_bytes: memory of codes, norms and centres of the last cache.
        kv_bytes: memory of its keys and values.
        refused: why the model was left as it is (only without strict).
        simulated: how many of the steps were queries of simulated calls.
        positions: queries of one-token calls and simulated ones, over rows, of the layer that searched most.
        searched: of these, for which keys were ranked beyond the forced ones: not where those take the whole budget,
            nor in rows that are too short to be indexed.
        keys_ranked: keys that a query head kept beyond the forced ones there, mean over the layers that searched.
        graph: what graphs of the steps were used for; None where none were wanted.
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
    simulated: int = 0
    positions: int = 0
    searched: int = 0
    keys_ranked: float = 0.0
    graph: GraphUse | None = None

    @property
    def searching_layers(self) -> tuple[int, ...]:
        """Those that searched, at least once."""
        return tuple(row.layer for row in self.layers if row.sparse)

    @property
    def why_none(self) -> str:
        """Why no layer searched: the reasons of all dense calls but prefill."""
        reasons = dict.fromkeys(why for row in self.layers for why in row.dense)
        if not reasons:
            return "the model was not called"
        return ", ".join(why for why in reasons if why != "prefill") or "there was no call but prefill"

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only."""
        return json.loads(self.as_json())

    def as_json(self, indent: int | None = 2) -> str:
        """The same as JSON text."""
        return json.dumps(asdict(self), indent=indent)

    def __str__(self) -> str:
        if self.refused:
            return "nothing is served, the model runs as it is: " + "; ".join(self.refused)
        head = ("layers", "sparse calls", "dense calls", "keys read", "a step", "engine")
        rows = [head, *_merged([(row.layer, _cells(row)) for row in self.layers])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.steps:
            kind = f"steps, {self.simulated} of them simulated" if self.simulated else "one-token steps"
            inside = f" ({self.sparse_keys_read:.1%} in the layers that searched)" if self.searching_layers else ""
            lines += [
                f"{self.steps} {kind}: {self.keys_read:.1%} of visible keys read{inside}",
                *self._ranked(),
                f"{self.bytes_per_step / 1e6:.1f} MB read a step, full attention "
                f"{self.dense_bytes_per_step / 1e6:.1f} MB",
                f"codes take {self.code_bytes / 1e6:.1f} MB beside {self.kv_bytes / 1e6:.1f} MB of keys and values",
            ]
        if self.graph is not None and self.graph.asked:
            lines.append(str(self.graph))
        if not self.searching_layers:
            lines.append(f"no layer searched: {self.why_none}")
        return "\n".join(lines)

    def _ranked(self) -> list[str]:
        if not any(row.sparse for row in self.layers):
            return []
        line = f"keys were ranked at {self.searched:,} of {self.positions:,} positions"
        if self.searched:
            return [f"{line}, {self.keys_ranked:.1f} a head and position beyond the forced ones"]
        return [
            f"{line}: NOTHING WAS SEARCHED, forced keys take the whole budget or rows are too short to be indexed; a "
            "larger share or k, or min_k=, ranks some beside the forced ones"
        ]


def _cells(row: LayerRow) -> tuple[str, ...]:
    dense = ", ".join(f"{n} ({why})" for why, n in row.dense.items()) or "0"
    keys = "-" if row.keys_read is None else f"{row.keys_read:.1%}"
    size = "-" if row.bytes_per_step is None else f"{row.bytes_per_step / 1e3:.1f} kB"
    engine = row.engine if row.why in ("", *row.dense) else f"{row.engine}: {row.why}"
    return str(row.sparse), dense, keys, size, engine or "-"


def _merged(rows: list[tuple[int, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Neighbouring layers whose cells are the same, as one row each."""
    runs: list[tuple[int, int, tuple[str, ...]]] = []
    for layer, cells in rows:
        if runs and runs[-1][2] == cells and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer, cells)
        else:
            runs.append((layer, layer, cells))
    return [(f"{a}" if a == b else f"{a}-{b}", *cells) for a, b, cells in runs]


def summarise(counts: Mapping[int, LayerCounts], refused: tuple[str, ...]) -> Report:
    """Read the counts of a model's layers and make a report."""
    searched = [r for r in counts.values() if r.sparse]
    steps = max((r.steps for r in counts.values()), default=0)
    per = max(1, steps)
    return Report(
        tuple(_row(i, r) for i, r in counts.items()),
        steps,
        _share(list(counts.values())),
        _share(searched),
        sum(r.scanned + int(r.read) for r in counts.values()) / per,
        sum(r.dense_bytes for r in counts.values()) / per,
        sum(r.code_bytes for r in counts.values()),
        sum(r.kv_bytes for r in counts.values()),
        refused,
        max((r.simulated for r in counts.values()), default=0),
        max((r.positions for r in searched), default=0),
        max((r.searched for r in searched), default=0),
        _ranked(searched),
    )


def _row(number: int, r: LayerCounts) -> LayerRow:
    keys = _share([r]) if r.steps else None
    size = (r.scanned + int(r.read)) / r.steps if r.steps else None
    return LayerRow(number, r.sparse, dict(r.dense), keys, size, r.engine, r.why, r.positions, r.searched, _ranked([r]))


def _ranked(layers: list[LayerCounts]) -> float:
    """Keys a query head and searched position, mean."""
    heads = sum(r.searched * r.heads for r in layers)
    return max(0.0, sum(int(r.ranked) for r in layers if r.searched) / max(1, heads))


def _share(layers: list[LayerCounts]) -> float:
    return sum(int(r.kept) for r in layers) / max(1, sum(r.visible for r in layers))
