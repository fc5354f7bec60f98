"""Results of whole models: a table."""

from __future__ import annotations

from typing import Any

from hashattn.lab.bench.report import aligned

NOTE = (
    "Tokens per second of all sequences; greedy decoding in a CUDA graph, one token at a time; medians. Weights, keys\n"
    "and values are random: no prompt is read. Layers attended to densely take the fastest dense attention as well.\n"
    "ceiling: how many times as fast a step is that attends to nothing at all."
)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a case and composition."""
    head = (
        "keys", "batch", "composition", "kernels", "dense layers", "dense", "tokens/s", "ms", "hashed: tokens/s", "ms",
        "x dense", "ceiling",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        case = (f"{row['keys']:,}", str(row["batch"]), row["name"], row["kernels"])
        skipped = ", ".join(map(str, row["dense_layers"])) or "none"
        dense = (row["dense"], f"{row['dense_tokens_per_s']:,.1f}", f"{row['ms'][row['dense']]:.2f}")
        step = (f"{row['tokens_per_s']:,.1f}", f"{row['ms']['step']:.2f}")
        lines.append((*case, skipped, *dense, *step, f"{row['speedup']:.2f}", f"{row['ceiling']:.2f}"))
    return aligned(lines)
