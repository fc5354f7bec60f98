"""Tables hold what benchmarks/results holds: docs/cpu.md, selectors.md, concepts.md and encoders.md."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def rows_of(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))["rows"]


def shape(row):
    heads, _, rest = row["shape"].partition("x")
    dim, _, dtype = rest.partition(":")
    return f"{heads}, {dim}, {dtype}"


def case(row):
    return f"| {shape(row)} | {row['keys']:,}, {row['k']:,} | "


def dense(row):
    return min(time for name, time in row["us"].items() if name in ("grouped SDPA", "grouped matmul"))


def cells(*values):
    return " | ".join(values) + " |"


def step_lines(name):
    for row in rows_of(name):
        us, floor = row["us"], row["floor_us"]
        said = [f"{dense(row):,.0f}", f"{us['step']:,.0f}", f"{dense(row) / us['step']:.1f}"]
        said.append(f"{row['over_loops']:.1f}")
        yield case(row) + cells(*said, f"{floor:,.0f}", f"{us['step'] / floor:.1f}")


def thread_lines():
    rows = rows_of("bench_cpu_threads")
    one, two = ([row for row in rows if row["threads"] == n] for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        steps = a["us"]["step"], b["us"]["step"]
        yield case(a) + cells(
            f"{dense(a):,.0f}, {dense(b):,.0f}", f"{steps[0]:,.0f}, {steps[1]:,.0f}", f"{steps[0] / steps[1]:.2f}",
            f"{dense(b) / steps[1]:.1f}", f"{steps[1] / b['floor_us']:.1f}",
        )  # fmt: skip


def auto_lines():
    by_shape = {}
    for row in rows_of("bench_cpu_auto"):
        searches = " (searches)" if row["auto_engine"] != "dense" else ""
        by_shape.setdefault(shape(row), []).append(f"{row['auto_cost']:.2f}{searches}")
    return [f"| {name} | {cells(*said)}" for name, said in by_shape.items()]


def local_lines():
    pairs = rows_of("local_topk_quality")
    for a, b in zip(pairs[::2], pairs[1::2], strict=True):
        assert (a["per_chunk"], b["per_chunk"]) == (16, 32)
        forced = "none" if a["forced"] is None else ", ".join(re.findall(r"\d+", a["forced"]))
        yield f"| {a['bits']} | {a['k']} ({a['share']:.0%}) | {forced} | " + cells(
            f"{a['overlap']:.1%}, {b['overlap']:.1%}", f"{a['mass_topk']:.3f}", f"{a['mass']:.3f}, {b['mass']:.3f}"
        )


def centring_lines():
    return [
        f"| {r['tokens']} | {r['subtracted']} | {r['mass']:.4f} |" for r in rows_of("centring") if r["tokens"] == 2048
    ]


@pytest.mark.parametrize(
    ("page", "lines"),
    [
        ("cpu", lambda: step_lines("bench_cpu")),
        ("cpu", lambda: step_lines("bench_cpu_query_head")),
        ("cpu", lambda: step_lines("bench_cpu_small")),
        ("cpu", thread_lines),
        ("cpu", auto_lines),
        ("selectors", local_lines),
        ("concepts", centring_lines),
    ],
    ids=["a KV head", "a query head", "a small model", "threads", "auto", "LocalTopK", "centring"],
)
def test_a_table_holds_the_figures_of_its_results_file(page, lines):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8").splitlines()
    missing = [line for line in lines() if line not in text]
    assert not missing, missing


def test_the_docs_show_what_hatas_loss_finds():
    spec = importlib.util.spec_from_file_location("hata_loss", ROOT / "benchmarks/hata_loss.py")
    hata_loss = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hata_loss)
    assert f"\n{hata_loss.table(rows_of('hata_loss'))}\n" in (ROOT / "docs/encoders.md").read_text(encoding="utf-8")
