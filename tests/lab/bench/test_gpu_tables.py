import importlib.util
import json
import sys
from pathlib import Path

import pytest

from hashattn.engines.gpus import GPUS
from tests.lab.bench.test_bench_cuda import row as step_row
from tests.lab.bench.test_crossover import ROWS as CROSSOVERS
from tests.lab.bench.test_e2e import ROW as MODEL
from tests.lab.bench.test_kinds import row as kind_row

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("gpu_tables", ROOT / "benchmarks/gpu_tables.py")
gpu_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_tables)
ONE_KERNEL = {"us": {"Triton": 18.0, "step": 9.0}, "whole_speedup": {}, "drift": None}
LOCAL = step_row(selector="LocalTopK", per="query_head", **ONE_KERNEL)
BEFORE = {name: value for name, value in step_row(byte_floor_us=3.0).items() if name != "drift"}
GENERATED = {
    "label": "stock, dynamic", "batch": 2, "keys": 65536, "ms": 49.9, "p99_ms": 52.25, "first_token_ms": 50.0,
    "prefill_ms": 5123.4, "memory_bytes": 33_400_000_000, "times_stock_dynamic": 1.0, "times_stock_static": None,
    "tokens_per_s": 40.08,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "head", "lines"),
    [
        (
            [step_row(byte_floor_us=3.0), LOCAL],
            "batch, keys, k | selector | choice per | fastest dense | step | times as fast | scan, attend | floor | "
            "times the floor | with linear encoder | with MLP | hints missed in 1,000 steps | p50, p99, largest",
            [
                "1, 8,192, 256 | TopK | kv head | 18.0 (our split-K) | 9.0 | 2.00 | 4.0, 5.0 | 3.0 | 3.0 | 10.0 (1.80) "
                "| 12.0 (1.50) | 3.0 | 9.5, 11.5, 540.0",
                "1, 8,192, 256 | LocalTopK | query head | 18.0 (our split-K) | 9.0 | 2.00 | one kernel | 3.0 | 3.0 | "
                " |  |  | ",
            ],
        ),
        (
            [BEFORE],
            "batch, keys, k | selector | choice per | fastest dense | step | times as fast | scan, attend | floor | "
            "times the floor | with linear encoder | with MLP",
            [
                "1, 8,192, 256 | TopK | kv head | 18.0 (our split-K) | 9.0 | 2.00 | 4.0, 5.0 | 3.0 | 3.0 | 10.0 (1.80) "
                "| 12.0 (1.50)",
            ],
        ),
        (
            [GENERATED, GENERATED | {"times_stock_static": 0.5}],
            "batch, keys | model.generate() | ms a token, p99 | first token | prefill | GB | times stock dynamic | "
            "times stock static | tokens/s",
            [
                "2, 65,536 | stock, dynamic | 49.9, 52.2 | 50.0 | 5,123 | 33.4 | 1.00 |  | 40.1",
                "2, 65,536 | stock, dynamic | 49.9, 52.2 | 50.0 | 5,123 | 33.4 | 1.00 | 0.50 | 40.1",
            ],
        ),
        (
            [kind_row(byte_floor_us=3.0), kind_row(kind="TopK", of_topk_in_triton=None)],
            "batch, keys, k | choice per | kind of step | kernels | keys kept | fastest dense | step | times as fast | "
            "time over TopK's | over TopK's in Triton | floor | times the floor",
            [
                "1, 131,072, 1,024 | kv head | Tiers, 16 critical | Triton | 1,024 | 180.0 (cuDNN) | 22.5 | 8.00 | "
                "1.50 | 1.25 | 3.0 | 7.5",
                "1, 131,072, 1,024 | kv head | TopK | Triton | 1,024 | 180.0 (cuDNN) | 22.5 | 8.00 | 1.50 |  | 3.0 | "
                "7.5",
            ],
        ),
        (
            [MODEL],
            "batch, keys | composition | dense layers | fastest dense, tokens/s | hashed, tokens/s | times as fast | "
            "ceiling",
            ["3, 32,768 | TopK per kv_head | 0, 1 | 150.0 (flash) | 300.0 | 2.00 | 2.22"],
        ),
        (
            CROSSOVERS,
            "steps | batch | choice per | wins from (keys) | dense | step",
            ["eager | 1 | kv head | 3,072 | 12.0 | 9.0", "captured | 1 | kv head | nowhere |  | "],
        ),
    ],
)  # fmt: skip
def test_each_benchmark_has_its_columns(rows, head, lines):
    found = gpu_tables.table(rows, gpu_tables.columns_of({"rows": rows})).splitlines()
    assert found[0] == f"| {head} |"
    assert found[1] == f"|{'---|' * len(head.split(' | '))}"
    assert found[2:] == [f"| {line} |" for line in lines]


def test_columns_that_no_row_fills_are_left_out():
    head = gpu_tables.table([LOCAL], gpu_tables.STEPS).splitlines()[0]
    assert "linear" not in head and "MLP" not in head and "selector" in head


def test_the_files_of_this_repository_are_read_and_others_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py"])
    gpu_tables.main()
    text = capsys.readouterr().out
    for path in (ROOT / "benchmarks/results").glob("bench_cuda*.json"):
        result = json.loads(path.read_text())
        own = text.split(f"{path.name}: `{result['command']}`")[1].split("\n\n")[1].splitlines()
        assert len(own) == 2 + len(result["rows"])
    assert "bench_cpu.json" not in text
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py", str(ROOT / "benchmarks/results/demo.json")])
    with pytest.raises(SystemExit):
        gpu_tables.main()
    assert "demo.json is not a file that hashattn bench gpu has written" in capsys.readouterr().err


def test_the_docs_show_the_tables_of_the_results_files():
    docs, shown = (ROOT / "docs/gpu.md").read_text(), 0
    for path in sorted(gpu_tables.RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        columns = gpu_tables.columns_of(result)
        if columns is not None:
            assert gpu_tables.table(result["rows"], columns) in docs, path.name
            assert path.name in docs
            shown += 1
    assert shown >= 6


def test_the_crossovers_are_those_of_their_results_files():
    for gpu in GPUS.values():
        measured = json.loads((gpu_tables.RESULTS / gpu.source).read_text())
        assert measured["device"] in GPUS
        assert measured["bytes"] == {"eager": gpu.eager, "captured": gpu.captured}
