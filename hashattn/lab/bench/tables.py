"""The tables of the benchmarks: their columns, and what is said below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hashattn.lab.report import Column, Row, table

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """Columns, and a note on what they hold."""

    columns: Sequence[Column]
    note: str

    def text(self, rows: Sequence[Row]) -> str:
        """For people."""
        return table(rows, self.columns)


def _plain(*names: str) -> list[Column]:
    """What rows hold under these names, as it is; whole numbers of keys in thousands."""

    def cell(row: Row, name: str) -> str:
        return f"{row[name]:,}" if name == "keys" else str(row[name])

    return [(name, partial(cell, name=name)) for name in names]


def _told(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _us(name: str, form: str = ",.1f") -> Cell:
    """A time, where there is one."""
    return lambda row: _told(row["us"].get(name), form)


def _number(name: str, form: str = ".2f") -> Cell:
    """A number, where there is one."""
    return lambda row: _told(row[name], form)


def _dense(form: str) -> Cell:
    """The time of the fastest dense attention."""
    return lambda row: _told(row["us"][row["dense"]], form)


def _of_floor(row: Row) -> str:
    return f"{row['us']['step'] / row['floor_us']:.1f}" if "step" in row["us"] else "-"


def _whole(encoder: str) -> list[Column]:
    """The step with an encoder, and how many times as fast as dense attention it is."""
    faster = "x dense", lambda row: _told(row["whole_speedup"].get(encoder), ".2f")
    return [(encoder, lambda row: _us(encoder)(row) if encoder in row["whole_speedup"] else "-"), faster]


def _winner(row: Row, name: str, form: str) -> str:
    """Of the times of a crossover those at the least number of keys that wins."""
    at: dict[str, Any] = next((us for us in row["us"] if us["keys"] == row["keys"]), {})
    return f"{at[name]:{form}}" if at else "nowhere" if name == "keys" else "-"


def _drift(name: str, form: str) -> Cell:
    """Of steps whose queries drift, where they were measured."""
    return lambda row: "-" if row["drift"] is None else f"{row['drift'][name]:{form}}"


_FLOOR: list[Column] = [("floor", _number("floor_us", ",.1f")), ("x floor", _of_floor)]
_STEP: list[Column] = [
    *_plain("dense"),
    ("us", _dense(",.1f")),
    ("step", _us("step")),
    ("x dense", _number("speedup")),
]

CPU = Table(
    [
        *_plain("shape", "threads", "keys", "k"),
        ("dense", _dense(",.0f")),
        ("step", _us("step", ",.0f")),
        ("x dense", _number("speedup")),
        ("x loops", _number("over_loops")),
        ("encode q", _us("encode query", ".0f")),
        ("encode k", _us("encode key", ".0f")),
        ("floor", lambda row: f"{row['floor_us']:,.0f}" if "step" in row["us"] else "-"),
        ("x floor", _of_floor),
        ("auto runs", lambda row: row["auto_engine"]),
        ("auto / dense", _number("auto_cost")),
    ],
    "Microseconds a layer, medians; every case was checked against the reference first. x loops: over dense attention\n"
    "by the step's own loops, which read every key once.",
)
_COLD = "Microseconds a layer, medians of cold CUDA-graph replays; every {} was checked against the reference first.\n"
_UNENCODED = "Encoding the query and the newest key is not part of the step. "
_FLOORS = "floor: the larger of the bytes read at the measured bandwidth and the popcounts at the clock's rate."
GPU = Table(
    [
        *_plain("shape", "batch", "keys", "k", "selector", "per", "bits", "kernels"),
        *_STEP,
        ("scan", _us("scan")),
        ("attend", _us("attend")),
        ("missed", _drift("missed_per_1000", ",.1f")),
        ("p50", _drift("p50_us", ".1f")),
        ("p99", _drift("p99_us", ".1f")),
        ("largest", _drift("max_us", ",.1f")),
        *_FLOOR,
        *_whole("linear"),
        *_whole("MLP"),
        ("topk", _us("torch.topk")),
        ("FAISS", _us("FAISS")),
    ],
    _COLD.format("case") + _UNENCODED + "attend = step - scan, the first of two kernels.\n"
    "missed: hints that missed, of any row, per thousand steps whose queries change as a real model's do; p50, p99,\n"
    "largest: of these steps.\n"
    "linear, MLP: the step with its encoder, for queries linear or d-256-256-bits, and with the newest key appended.\n"
    f"{_FLOORS}\n"
    "topk: torch.topk over distances made beforehand; FAISS: no graph, its host's part included. Neither attends.",
)
KINDS = Table(
    [
        *_plain("shape", "batch", "keys", "k", "bits", "per", "kind", "kernels"),
        ("kept", _number("kept", ",.0f")),
        *_STEP,
        ("/ TopK", _number("of_topk")),
        ("/ in Triton", _number("of_topk_in_triton")),
        *_FLOOR,
    ],
    _COLD.format("step") + _UNENCODED + "kept: keys a choice, observed, on average.\n"
    "/ TopK, / in Triton: a step's time over that of the line TopK, and for Triton's kernels, of TopK in Triton.\n"
    "Tiers: logits of medium keys are estimated (MixedPrecision); values are read in full.\n"
    f"{_FLOORS}",
)
E2E = Table(
    [
        *_plain("keys", "batch"),
        ("composition", lambda row: row["name"]),
        *_plain("kernels"),
        ("dense layers", lambda row: ", ".join(map(str, row["dense_layers"])) or "none"),
        *_plain("dense"),
        ("tokens/s", _number("dense_tokens_per_s", ",.1f")),
        ("ms", lambda row: f"{row['ms'][row['dense']]:.2f}"),
        ("hashed: tokens/s", _number("tokens_per_s", ",.1f")),
        ("ms", lambda row: f"{row['ms']['step']:.2f}"),
        ("x dense", _number("speedup")),
        ("ceiling", _number("ceiling")),
    ],
    "Tokens per second of all sequences; greedy decoding in a CUDA graph, one token at a time; medians. Weights, keys\n"
    "and values are random: no prompt is read. Layers attended to densely take the fastest dense attention as well.\n"
    "ceiling: how many times as fast a step is that attends to nothing at all.",
)
GENERATE = Table(
    [
        *_plain("label", "batch", "keys"),
        ("ms", _number("ms")),
        ("p99", _number("p99_ms")),
        ("slowest", _number("slowest_ms", ",.1f")),
        ("first", _number("first_token_ms", ",.1f")),
        ("prefill", _number("prefill_ms", ",.0f")),
        ("GB", lambda row: "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e9:.1f}"),
        ("x dynamic", _number("times_stock_dynamic")),
        ("x static", _number("times_stock_static")),
        ("tokens/s", _number("tokens_per_s", ",.1f")),
        ("keys read", lambda row: f"{row['keys_read']:.1%}"),
        ("warm-up s", _number("warm_up_s", ".1f")),
    ],
    "Milliseconds a token of one call of model.generate(), medians; greedy, behind random tokens: cost, not quality.\n"
    "With a budget of every key each writes the tokens of the model as it is. slowest: of all tokens but the first;\n"
    "first: the next one, which waits for the index. prefill: until the first token. GB: held when the last one is\n"
    "written, weights included. x dynamic, x static: as many tokens per second as the model as it is, with a dynamic\n"
    "cache and with a static one, compiled. warm-up: seconds that the first call took longer, compiling included.",
)
CROSSOVER = Table(
    [
        *_plain("mode", "shape", "batch", "per", "bits", "kernels"),
        ("wins from", lambda row: _winner(row, "keys", ",")),
        ("dense", lambda row: _winner(row, "dense", ",.1f")),
        ("step", lambda row: _winner(row, "step", ",.1f")),
    ],
    "The least numbers of keys tried from which a step takes clearly less than dense attention, and microseconds.\n"
    "eager: attn.run from Python, launches and the newest key's encoding included. captured: in a CUDA graph, without.",
)

CROSSOVER_CPU = Table(
    [*_plain("shape", "per", "share"), ("wins from", lambda row: "-" if row["keys"] is None else f"{row['keys']:,}")],
    "The least number of keys from which a compiled step is expected to take clearly less than dense attention, on\n"
    "one thread, its newest key's and query's encoding and all Python included.",
)
