"""The tables of docs/gpu.md, in Markdown, from the files that `hashattn bench gpu` has written.

python benchmarks/gpu_tables.py [FILE.json ...]; without files, all of them in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hashattn.lab.report import Column, Row, markdown

RESULTS = Path(__file__).parent / "results"


def case(row: Row) -> str:
    """Sequences, keys, and keys kept."""
    return f"{row['batch']}, {row['keys']:,}, {row['k']:,}"


def per(row: Row) -> str:
    """Who chooses."""
    return str(row["per"]).replace("_", " ")


def name(dense: str) -> str:
    """Of a dense contender."""
    return "our split-K" if dense.startswith("Triton") else dense.removeprefix("SDPA ")


def dense_us(row: Row) -> str:
    """Time of the fastest dense attention, and its name."""
    return f"{row['us'][row['dense']]:,.1f} ({name(row['dense'])})"


def stages(row: Row) -> str:
    """Times of both kernels."""
    us = row["us"]
    return f"{us['scan']:,.1f}, {us['attend']:,.1f}" if "scan" in us else "one kernel"


def whole(encoder: str) -> Callable[[Row], str]:
    """Time of a step with its encoder, and how many times as fast as dense attention that is."""

    def cell(row: Row) -> str:
        faster = row.get("whole_speedup", {}).get(encoder)
        return "" if faster is None else f"{row['us'][encoder]:,.1f} ({faster:.2f})"

    return cell


def times(key: str) -> Callable[[Row], str]:
    """A ratio, where a row has it."""
    return lambda row: "" if row[key] is None else f"{row[key]:.2f}"


def drift(*names: str) -> Callable[[Row], str]:
    """Of steps whose queries drift, where they were measured."""
    return lambda row: ", ".join(f"{row['drift'][name]:,.1f}" for name in names) if row.get("drift") else ""


def milliseconds(*names: str) -> Callable[[Row], str]:
    """Times of a call of generate()."""
    return lambda row: ", ".join(f"{row[name]:,.1f}" for name in names)


def gigabytes(row: Row) -> str:
    """Memory, where it is known."""
    return "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e9:.1f}"


def at_crossover(what: str) -> Callable[[Row], str]:
    """A time at the least number of keys that wins."""

    def cell(row: Row) -> str:
        at = next((us for us in row["us"] if us["keys"] == row["keys"]), None)
        return "" if at is None else f"{at[what]:,.1f}"

    return cell


STEP: Column = ("step", lambda row: f"{row['us']['step']:,.1f}")
FLOOR: list[Column] = [
    ("floor", lambda row: f"{row['floor_us']:,.1f}"),
    ("times the floor", lambda row: f"{row['us']['step'] / row['floor_us']:.1f}"),
]
STEPS: list[Column] = [
    ("batch, keys, k", case), ("selector", lambda row: row.get("selector", "TopK")), ("choice per", per),
    ("fastest dense", dense_us), STEP, ("times as fast", times("speedup")), ("scan, attend", stages), *FLOOR,
    ("with linear encoder", whole("linear")), ("with MLP", whole("MLP")),
    ("hints missed in 1,000 steps", drift("missed_per_1000")),
    ("p50, p99, largest", drift("p50_us", "p99_us", "max_us")),
]  # fmt: skip
KINDS: list[Column] = [
    ("batch, keys, k", case), ("choice per", per), ("kind of step", lambda row: row["kind"]),
    ("kernels", lambda row: row["kernels"]), ("keys kept", lambda row: f"{row['kept']:,.0f}"),
    ("fastest dense", dense_us), STEP, ("times as fast", times("speedup")), ("time over TopK's", times("of_topk")),
    ("over TopK's in Triton", times("of_topk_in_triton")), *FLOOR,
]  # fmt: skip
MODELS: list[Column] = [
    ("batch, keys", lambda row: f"{row['batch']}, {row['keys']:,}"), ("composition", lambda row: row["name"]),
    ("dense layers", lambda row: ", ".join(map(str, row["dense_layers"])) or "none"),
    ("fastest dense, tokens/s", lambda row: f"{row['dense_tokens_per_s']:,.1f} ({name(row['dense'])})"),
    ("hashed, tokens/s", lambda row: f"{row['tokens_per_s']:,.1f}"), ("times as fast", times("speedup")),
    ("ceiling", times("ceiling")),
]  # fmt: skip
CROSSOVERS: list[Column] = [
    ("steps", lambda row: row["mode"]), ("batch", lambda row: str(row["batch"])), ("choice per", per),
    ("wins from (keys)", lambda row: "nowhere" if row["keys"] is None else f"{row['keys']:,}"),
    ("dense", at_crossover("dense")), ("step", at_crossover("step")),
]  # fmt: skip
GENERATE: list[Column] = [
    ("batch, keys", lambda row: f"{row['batch']}, {row['keys']:,}"), ("model.generate()", lambda row: row["label"]),
    ("ms a token, p99", milliseconds("ms", "p99_ms")), ("first token", milliseconds("first_token_ms")),
    ("prefill", lambda row: f"{row['prefill_ms']:,.0f}"), ("GB", gigabytes),
    ("times stock dynamic", times("times_stock_dynamic")), ("times stock static", times("times_stock_static")),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:,.1f}"),
]  # fmt: skip
TABLES = {
    "kind": KINDS,
    "mode": CROSSOVERS,
    "prefill_ms": GENERATE,
    "tokens_per_s": MODELS,
    "byte_floor_us": STEPS,
}  # by what rows hold


def columns_of(result: dict[str, Any]) -> list[Column] | None:
    """The columns of a file's table; None for a file of another benchmark."""
    rows = result.get("rows")
    known = [columns for key, columns in TABLES.items() if rows and key in rows[0]]
    return known[0] if known else None


def table(rows: list[Row], columns: list[Column]) -> str:
    """Markdown; columns that are empty in all rows are left out."""
    cells = [[cell(row) for _, cell in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    return markdown([[columns[i][0] for i in used], *([line[i] for i in used] for line in cells)])


def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    given = parser.parse_args().files
    for path in given or sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        columns = columns_of(result)
        if columns is not None:
            print(f"{path.name}: `{result['command']}`, {result['device']}, {result['date']}\n")
            print(table(result["rows"], columns), end="\n\n")
        elif given:
            parser.error(f"{path} is not a file that hashattn bench gpu has written")


if __name__ == "__main__":
    main()
