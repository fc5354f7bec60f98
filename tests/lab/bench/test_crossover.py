import json
from pathlib import Path

import pytest
import torch

from hashattn import FlatHamming, HashAttention, SimHash, TopK
from hashattn.cli import main
from hashattn.engines import gpus
from hashattn.engines.base import Request
from hashattn.engines.choose import choose
from hashattn.engines.gpus import GPUS, Gpu, this_gpu
from hashattn.lab.bench import crossover, tables
from hashattn.lab.bench.cases import Settings
from hashattn.lab.bench.crossover import LEAST, MARGIN, first_win, sizes

H100 = "NVIDIA H100 80GB HBM3"


def row(mode, keys, **us):
    case = {"shape": "4/2x64:float16", "batch": 1, "per": "kv_head", "bits": 64, "kernels": "Triton"}
    return {"mode": mode, **case, "keys": keys, "bytes": keys and 512 * keys, "us": [{"keys": 3072, **us}]}


ROWS = [row("eager", 3072, dense=12.0, step=9.0), row("captured", None, dense=9.0, step=9.0)]


# ---- finding it


def test_powers_of_two_and_the_middles_between_them_are_tried():
    assert sizes(4096, 8192 * 4096) == [2048, 3072, 4096, 6144, 8192]
    assert sizes(4096, LEAST * 4096 - 1) == []


@pytest.mark.parametrize("least", [*range(2048, 70000, 3000), 65536, 65537, 1 << 20])
def test_bisection_finds_the_least_number_of_keys_that_wins(least):
    tried, asked = sizes(1, 65536), []

    def measure(keys):
        asked.append(keys)
        return {"dense": float(keys), "step": MARGIN * least}

    expected = next((n for n in tried if n >= least), None)
    found, measured = first_win(tried, measure)
    assert found == expected
    assert sorted(asked) == list(measured)
    assert len(asked) == len(set(asked)) <= 4
    assert measured.keys() >= {n for n in (found,) if n}


def test_the_margin_must_be_kept():
    assert first_win([4096], lambda _: {"dense": 1.0, "step": MARGIN})[0] == 4096
    assert first_win([4096], lambda _: {"dense": 1.0, "step": MARGIN + 1e-6})[0] is None


def test_constants_hold_in_every_measured_case():
    rows = [{"mode": m, "bytes": b} for m, b in (("eager", 5), ("eager", 7), ("eager", 6), ("captured", 3))]
    assert crossover.constants(rows) == {"eager": 7, "captured": 3}
    assert crossover.constants([*rows, {"mode": "eager", "bytes": None}])["eager"] is None
    assert crossover.constants([{"mode": "eager", "bytes": None}, *rows])["eager"] is None


# ---- telling it


def test_the_table_has_a_line_a_crossover():
    head, eager, captured = tables.CROSSOVER.text(ROWS).splitlines()
    assert head.split()[0] == "mode"
    assert eager.split() == ["eager", "4/2x64:float16", "1", "kv_head", "64", "Triton", "3,072", "12.0", "9.0"]
    assert captured.split()[-3:] == ["nowhere", "-", "-"]


def test_the_line_to_keep_is_what_the_table_of_gpus_holds():
    text = crossover.entry("a GPU", (9, 0), {"eager": 7, "captured": 3}, "x.json").splitlines()[1]
    assert eval("{" + text + "}") == {"a GPU": Gpu((9, 0), 7, 3, "x.json")}
    assert "no line" in crossover.entry("a GPU", (9, 0), {"eager": None, "captured": 3}, "x.json")


def test_the_command_writes_how_its_results_came_about(tmp_path, monkeypatch, capsys):
    result = {"bytes": {"eager": 7, "captured": 3}, "notes": ["a remark"], "rows": ROWS}
    asked = []
    monkeypatch.setattr(crossover, "run", lambda *a, **o: asked.append((a, o)) or result)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    out = tmp_path / "x.json"
    assert main(["bench", "crossover", "--device", "cuda", "--batch", "3", "--out", str(out)]) == 0
    assert asked == [(((32, 8, 128, "bfloat16"), [3], Settings()), {"progress": True})]
    printed = capsys.readouterr().out
    line = f"'a GPU': Gpu(capability=(8, 0), eager=7, captured=3, source={str(out)!r}, calibrated=None, families={{}}),"
    assert line in printed
    assert "note: a remark" in printed
    assert json.loads(out.read_text())["rows"] == ROWS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "4/2x64"], ["--shape", "4/2x64"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["--bits", "100"], ["--bits", "100"]),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(crossover, "first_win", lambda *_: pytest.fail("measured"))
    assert main(["bench", "crossover", *arguments]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_without_a_gpu_the_message_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "crossover", "--device", "cuda"]) == 2
    assert "NVIDIA GPU" in capsys.readouterr().err


# ---- using it


def pretend(monkeypatch, name, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def test_a_gpu_is_found_by_name_then_by_its_class(monkeypatch):
    table = {name: Gpu((major, 0), size, 9, "") for name, major, size in (("a", 9, 100), ("b", 9, 200), ("c", 8, 300))}
    monkeypatch.setattr(gpus, "GPUS", table)
    for name, capability, expected in (("a", (9, 0), "a"), ("another", (9, 0), "b"), ("x", (8, 0), "c")):
        pretend(monkeypatch, name, capability)
        assert this_gpu() == (expected, table[expected])
    pretend(monkeypatch, "x", (7, 5))
    assert this_gpu() is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("a", "b")[device.index])
    for index, expected in enumerate("ab"):  # whichever is the current one
        assert this_gpu(torch.device("cuda", index)) == (expected, table[expected])
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    assert this_gpu(torch.device("cuda", 0)) is None  # an AMD GPU, of which nothing was measured
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_gpu() is None


def test_eager_steps_go_by_the_eager_crossover_and_explain_names_both(monkeypatch):
    pytest.importorskip("triton")
    attn = HashAttention(SimHash(64), FlatHamming(), TopK(k=64))
    size = {"batch": 2, "q_heads": 8, "kv_heads": 2, "head_dim": 64, "device": "cuda"}
    assert attn.explain(**size, keys=5000).provenance == ""
    monkeypatch.setattr(gpus, "GPUS", {H100: Gpu((9, 0), 5_000_000, 1_000_001, "x.json")})
    pretend(monkeypatch, H100, (9, 0))
    request = Request(torch.device("cuda"), torch.bfloat16, 2, 8, 2, 64)
    least = choose(attn.parts, request).crossover
    assert least == -(-5_000_000 // (2 * 2 * 2 * 64 * 2))
    below, above = (attn.explain(**size, keys=n) for n in (least - 1, least))
    assert (below.engine, above.engine, above.crossover) == ("dense", "gpu", least)
    assert f'"auto" runs dense below {least:,} keys' in str(above)
    assert f"{H100}, x.json; in a CUDA graph a step wins from 977 keys on" in str(above)


def test_the_table_says_what_its_files_say():
    root = Path(crossover.__file__).parents[3]
    for name, gpu in GPUS.items():
        result = json.loads((root / "benchmarks/results" / gpu.source).read_text())
        assert (result["device"], result["bytes"]) == (name, {"eager": gpu.eager, "captured": gpu.captured})


# ---- for real


@pytest.mark.gpu
def test_a_small_crossover_is_measured(monkeypatch):
    monkeypatch.setattr(crossover, "LARGEST", {"eager": 64 << 20, "captured": 16 << 20})
    result = crossover.run((8, 2, 64, "bfloat16"), [2], Settings(pers=["kv_head"]))
    assert [row["mode"] for row in result["rows"]] == ["eager", "captured"]
    for row in result["rows"]:
        assert all(us["dense"] > 0 and us["step"] > 0 for us in row["us"])
        wins = [us["keys"] for us in row["us"] if us["step"] <= MARGIN * us["dense"]]
        assert row["keys"] == min(wins, default=None)
