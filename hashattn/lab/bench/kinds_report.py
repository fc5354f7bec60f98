"""Results of the kinds of steps: a table."""

from __future__ import annotations

from typing import Any

from hashattn.lab.bench.report import aligned

NOTE = (
    "Microseconds a layer, medians of cold CUDA-graph replays; every step was checked against the reference first.\n"
    "Encoding the query and the newest key is not part of the step. kept: keys a choice, observed, on average.\n"
    "/ TopK, / in Triton: a step's time over that of the line TopK, and for Triton's kernels, of TopK in Triton.\n"
    "Tiers: logits of medium keys are estimated (MixedPrecision), which runs in Triton; values are read in full.\n"
    "floor: the larger of the bytes read at the measured bandwidth and the popcounts at the clock's rate."
)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a kind of step: times in microseconds a layer, ratios to dense attention, to TopK and to the floor."""
    lines: list[tuple[str, ...]] = [(
        "shape", "batch", "keys", "k", "bits", "per", "kind", "kernels", "kept", "dense", "us", "step", "x dense",
        "/ TopK", "/ in Triton", "floor", "x floor",
    )]  # fmt: skip
    for row in rows:
        us, beside = row["us"], row["of_topk_in_triton"]
        case = (row["shape"], str(row["batch"]), f"{row['keys']:,}", str(row["k"]), str(row["bits"]), row["per"])
        kind = (row["kind"], row["kernels"], f"{row['kept']:,.0f}", row["dense"], f"{us[row['dense']]:,.1f}")
        step = (f"{us['step']:,.1f}", f"{row['speedup']:.2f}", f"{row['of_topk']:.2f}")
        floor = (f"{row['floor_us']:,.1f}", f"{us['step'] / row['floor_us']:.1f}")
        lines.append((*case, *kind, *step, "-" if beside is None else f"{beside:.2f}", *floor))
    return aligned(lines)
