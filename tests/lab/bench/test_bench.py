import json

import pytest
import torch

from hashattn.cli import main
from hashattn.lab.bench import cpu, tables
from hashattn.lab.bench.cases import AUTO_KEYS, KEYS, SHAPES, Case, parse_keys, parse_shape
from hashattn.lab.bench.dense import DENSE
from hashattn.lab.bench.measure import take_turns
from hashattn.ops.compiled.step import Step
from tests.structured import qkv, raises_naming

SMALL = ["--shape", "4/2x16:float32", "--keys", "600:50", "--rounds", "1"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(cpu, "_COLD", 1 << 20)
    monkeypatch.setattr(cpu, "read_bandwidth", lambda: 1e10)  # half a gigabyte is not needed to test the rest


def test_every_case_is_checked_then_measured_and_its_ratios_are_those_of_its_times():
    before = torch.get_num_threads()
    cases = [Case(4, 2, 16, dtype, 600, 50, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)]
    result = cpu.run(cases, rounds=1)
    assert torch.get_num_threads() == before
    assert result["read_GB_per_s"] == {"1": 10.0, "2": 10.0}
    for case, row in zip(cases, result["rows"], strict=True):
        us = row["us"]
        assert (row["shape"], row["keys"], row["k"], row["threads"]) == (case.shape, 600, 50, case.threads)
        assert row["dense"] == min(DENSE, key=us.get)
        assert row["speedup"] == us[row["dense"]] / us["step"]
        assert row["auto_cost"] == us["auto"] / us[row["dense"]]
        assert row["auto_engine"] == "dense"  # 600 keys are below any crossover
        size = 2 if "bfloat16" in case.shape else 4
        assert row["floor_us"] == pytest.approx((2 * 600 * 16 + 2 * 2 * 50 * 16 * size) / 1e10 * 1e6)
        assert all(0 < time < float("inf") for time in us.values())


def test_below_the_warm_up_there_is_no_step_to_measure():
    (row,) = cpu.run([Case(4, 2, 16, "float32", 128, 50)], rounds=1)["rows"]
    assert "step" not in row["us"]
    assert row["speedup"] is None
    assert "dense" in tables.CPU.text([row])


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_nothing_is_measured_where_other_keys_are_selected(monkeypatch, per):
    right = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *a: (x := right(*a))._replace(ids=(x.ids + 1) % 600))
    raises_naming(RuntimeError, "selects other keys", "nothing is measured")(
        lambda: cpu.run([Case(4, 2, 16, "float32", 600, 50)], per=per, rounds=1)
    )


def test_nothing_is_measured_where_the_output_is_wrong(monkeypatch):
    right = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *a: (x := right(*a))._replace(out=x.out * 1.01))
    raises_naming(RuntimeError, "off by", "nothing is measured")(
        lambda: cpu.run([Case(4, 2, 16, "float32", 600, 50)], rounds=1)
    )


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_baselines_attend_to_everything(name, dtype):
    q, k, v = qkv(0, kv_heads=2, group=3, keys=65, dtype=dtype)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    logits = (q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2)).abs().max() / 4
    tolerance = (8 + 2 * logits) * torch.finfo(dtype).eps * v.abs().max()  # logits are rounded to the dtype
    assert (DENSE[name](q, k, v) - exact).abs().max() <= tolerance


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    calls = []
    times = take_turns({"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}, 2, 2)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3
    assert times.keys() == {"a", "b"}
    assert all(t > 0 for t in times.values())


def test_the_default_cases_are_well_formed():
    assert [parse_shape(s) for s in SHAPES] == [
        (32, 8, 128, "float32"), (32, 8, 128, "bfloat16"), (9, 3, 64, "float32"),
    ]  # fmt: skip
    assert all(parse_keys(f"{n}:{k}") == (n, k) for n, k in KEYS)
    assert AUTO_KEYS[0][0] == 128


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], ["threads", "0", "at least 1"]),
        (["--shape", "4x16"], ["--shape", "4x16", "32/8x128:float32"]),
        (["--shape", "4/3x16:float32"], ["multiple of the KV heads", "4/3x16"]),
        (["--shape", "4/2x16:int8"], ["float32, bfloat16", "int8"]),
        (["--keys", "600"], ["--keys", "'600'", "4096:256"]),
        (["--keys", "600:601"], ["--keys", "600:601"]),
        (["--rounds", "0"], ["--rounds", "0"]),
        (["--bits", "7"], ["bits", "7", "8 to 4096"]),
        (["--out", "/no/such/folder/x.json"], ["--out", "/no/such/folder"]),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(cpu, "take_turns", lambda *_: pytest.fail("measured"))
    assert main(["bench", "cpu", *SMALL, *arguments]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_the_command_prints_a_table_and_writes_how_it_came_about(tmp_path, capsys):
    out = tmp_path / "bench.json"
    command = ["bench", "cpu", *SMALL, "--out", str(out)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["shape", "threads", "keys", "k"]
    assert lines[1].split()[:4] == ["4/2x16:float32", "1", "600", "50"]
    result = json.loads(out.read_text())
    assert result["command"].startswith("hashattn bench cpu --shape 4/2x16:float32")
    assert {"date", "device", "versions", "read_GB_per_s", "rows"} <= result.keys()
    assert result["versions"]["torch"] == torch.__version__
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]  # no temporary file is left
