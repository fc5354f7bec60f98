import json
from dataclasses import replace

import pytest
import torch

from hashattn.cli import main
from hashattn.lab.bench import cuda_graphs, kinds, tables
from hashattn.lab.bench.cases import Case, Settings
from hashattn.lab.bench.cuda_graphs import checked_step
from hashattn.lab.bench.cuda_inputs import make_layer, with_estimate, with_signs
from hashattn.lab.bench.cuda_reads import reads
from hashattn.lab.bench.cuda_steps import rule
from hashattn.lab.bench.floors import Machine
from hashattn.lab.bench.kinds import DASHKV, IN_TRITON, TOPK, radius_for
from hashattn.ops import decode
from hashattn.ops.decode import Scratch
from hashattn.ops.decode.cuda import decode as in_cuda
from hashattn.selectors import LocalTopK, Tiers

CASE = Case(4, 2, 64, "float32", 600, 130, batch=2)
LARGE = Case(32, 8, 128, "bfloat16", 131072, 1024)
CPU = torch.device("cpu")


def is_triton(name):
    return name.endswith("in Triton")


# ---- what is measured


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_every_kind_asks_for_what_its_name_says(per):
    found = {name: (rule(LARGE, kind.selector), kind) for name, kind in kinds.kinds(LARGE, per, 22).items()}
    assert all(asked.shared == (per == "kv_head") for asked, _ in found.values())
    assert all(kind.triton == is_triton(name) for name, (_, kind) in found.items())
    assert [name for name, (_, kind) in found.items() if kind.planes == 2] == ["TopK, queries of 2 planes"]
    forced = found["TopK, 4 sinks, 64 recents"][0]
    assert (forced.k, forced.sinks, forced.recents) == (1024, 4, 64)
    radius = 22 * (4 if per == "kv_head" else 1)
    limited, free = (found[f"Threshold, radius 22{end}"][0] for end in (", at most 2,048", ""))
    assert (limited.k, limited.radius, free.k, free.share, free.radius) == (2048, radius, None, 1.0, radius)
    for own in (16, 32):
        chunks = found[f"LocalTopK, {own} a chunk"][0]
        assert (chunks.k, chunks.per_chunk) == (1024, own)
    assert sum("Tiers" in name for name in found) == 2
    votes, dashkv = found["TopK, votes"][0], found[DASHKV][0]
    assert votes.k == 1024 and votes.vote_share == dashkv.vote_share == 0.5
    assert (votes.prior_ratio, dashkv.prior_ratio) == (None, 1.0) and dashkv.critical < dashkv.share


@pytest.mark.parametrize(("keys", "k"), [(131072, 1024), (600, 130), (3001, 997), (128, 128)])
def test_tiers_are_as_many_keys_as_named(keys, k):
    case = replace(CASE, keys=keys, k=k)
    for name, kind in kinds.kinds(case, "query_head", 20).items():
        if isinstance(kind.selector, Tiers):
            critical = int(name.split()[1].replace(",", ""))
            assert critical in (case.k // 2, case.k // 64)
            assert (kind.selector.critical(case.keys), kind.selector.budget(case.keys)) == (critical, case.k)
        elif isinstance(kind.selector, LocalTopK):
            assert case.k <= kind.selector.k < case.k + kind.selector.per_chunk


def test_the_radius_is_the_one_that_keeps_about_k():
    found = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 1, 9, 9, 9, 12]], dtype=torch.int32)
    kept = [(found <= r).sum(1).float().mean().item() for r in range(13)]
    assert [kept[radius_for(found, k, 1)] for k in (2, 3, 4, 5, 8)] == [2.5, 3.0, 4.0, 5.0, 8.0]
    assert radius_for(found, 4, 3) == 1  # 3.5 of them have a sum of at most 3, 5 of at most 6
    assert radius_for(found, 6, 3) in (2, 3)


# ---- running it


@pytest.fixture
def pretended(monkeypatch):
    """A run on the CPU: the specification is the step, every graph is a list of calls that were made once."""
    make = make_layer
    monkeypatch.setattr(cuda_graphs, "make_layer", lambda *a, device, **o: make(*a, device=CPU, **o))
    monkeypatch.setattr(cuda_graphs, "layer_count", lambda *_: 2)
    monkeypatch.setattr(cuda_graphs, "step_count", lambda _: 2)
    monkeypatch.setattr(kinds, "refuse", lambda *_: None)
    monkeypatch.setattr(kinds, "kernels", lambda: "CUDA C++")
    monkeypatch.setattr(kinds, "measure_machine", lambda: Machine(1e12, 100, None))
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(cuda_graphs, "capture", lambda calls: [call() for call in calls])
    monkeypatch.setattr(kinds, "take_turns", lambda graphs, calls, _: {n: 50.0 + i for i, n in enumerate(graphs)})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def sdpa(q, keys, values):
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    monkeypatch.setattr(cuda_graphs, "dense", lambda *_: {"a": sdpa, "b": sdpa})

    def fused(layer, i, bounds, rule, scratch, scan_only=False, triton=False):
        return tuple(x for x in decode.reference(layer.inputs(i, rule)) if x is not None)

    monkeypatch.setattr(cuda_graphs, "fused", fused)


def test_every_kind_has_a_row_with_its_ratios(pretended):
    pytest.importorskip("triton")
    result = kinds.run([CASE], Settings(rounds=1))
    rows = {(r["per"], r["kind"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"]) == 13 + 11
    assert all("left out per kv_head: LocalTopK" in note for note in result["notes"][1:]) and len(result["notes"]) == 3
    assert result["notes"][0].startswith("no popcount floor")
    for (per, name), r in rows.items():
        assert (r["dense"], r["layers"], r["calls"]) == ("a", 2, 4)
        assert r["us"].keys() == {"a", "b", "step"}
        assert r["speedup"] == 50 / r["us"]["step"]
        assert r["of_topk"] == r["us"]["step"] / rows[per, TOPK]["us"]["step"]
        in_triton = r["us"]["step"] / rows[per, IN_TRITON]["us"]["step"]
        assert r["kernels"] == ("Triton" if is_triton(name) else "CUDA C++")
        assert r["of_topk_in_triton"] == (in_triton if r["kernels"] == "Triton" else None)
        heads = 2 if per == "kv_head" else 4
        assert r["values_read"] <= 2 * heads * r["kept"]
        assert (r["values_read"] == pytest.approx(2 * heads * r["kept"])) == (per == "kv_head")
        read = 2 * 2 * 600 * 8 + (r["keys_read"] + r["values_read"]) * 256  # codes, keys and values; norms besides
        least = r["byte_floor_us"] * 1e6
        assert least > read if "Tiers" in name or DASHKV in name else least == pytest.approx(read)
        if "Threshold" in name:
            assert 80 < r["kept"] < 220
        else:
            assert r["kept"] == {"LocalTopK, 16 a chunk": 144, "LocalTopK, 32 a chunk": 160}.get(name, 130)
    for per in ("query_head", "kv_head"):
        limited, free = (r for r in result["rows"] if r["per"] == per and "Threshold" in r["kind"])
        assert limited["kept"] == pytest.approx(free["kept"], rel=0.05)
        half, few = (r for r in result["rows"] if r["per"] == per and "Tiers" in r["kind"])
        assert few["keys_read"] < half["keys_read"] < half["values_read"] == few["values_read"]
    assert len(tables.KINDS.text(result["rows"]).splitlines()) == 25


def test_other_families_of_scores_are_measured_beside_topk(pretended):
    pytest.importorskip("triton")
    rows = kinds.run([CASE], Settings(pers=["kv_head"], rounds=1), families=True)["rows"]
    names = [r["kind"] for r in rows]
    assert names[:2] == [TOPK, IN_TRITON] and len(names) == 9
    bits = [128, 128, 256, 512, 2048, 2048, 0]  # 16 bytes; 64 signs and two numbers; 2 / 16 of a key, 1 / 4, all
    assert [r["bits"] for r in rows[2:]] == bits
    for r in rows[2:]:
        assert r["kept"] == 130 and r["kernels"] == "Triton" and r["of_topk_in_triton"] is not None
        read = 2 * 2 * 600 * r["bits"] / 8 + (r["keys_read"] + r["values_read"]) * 256
        assert r["byte_floor_us"] * 1e6 == pytest.approx(read) and r["popcount_floor_us"] is None


def test_without_cuda_kernels_every_row_is_beside_topk_in_triton(pretended, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(kinds, "kernels", lambda: "Triton")
    rows = kinds.run([CASE], Settings(pers=["kv_head"], rounds=1))["rows"]
    assert {r["kernels"] for r in rows} == {"Triton"}
    assert all(r["of_topk_in_triton"] for r in rows)
    few = kinds.run([CASE], Settings(pers=["kv_head"], rounds=1), only="DASH-KV")["rows"]
    assert [r["kind"] for r in few] == [TOPK, IN_TRITON, DASHKV, f"{DASHKV}, in Triton"]


def test_nothing_is_measured_where_a_kind_is_wrong(pretended, monkeypatch):
    pytest.importorskip("triton")
    right = cuda_graphs.fused

    def wrong(layer, i, bounds, rule, *a, **o):
        out, *rest = right(layer, i, bounds, rule, *a, **o)
        return (out if rule.critical is None else out * 1.01, *rest)

    monkeypatch.setattr(cuda_graphs, "fused", wrong)
    monkeypatch.setattr(kinds, "take_turns", lambda *_: pytest.fail("measured"))
    with pytest.raises(RuntimeError, match=r"off by .* nothing is measured"):
        kinds.run([CASE], Settings(pers=["kv_head"]))


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_triton_kernels_are_checked_and_run_as_they_will_be(monkeypatch, per):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    monkeypatch.setattr(in_cuda, "decode", lambda *_, **__: pytest.fail("not Triton's"))
    case = Case(4, 2, 64, "float32", 200, 128)
    layer = with_estimate(make_layer(case, 64, steps=1, clustered=False, seed=0, device=CPU, planes=2))
    named = kinds.kinds(case, per, 25)
    for name, kept, critical in ((f"{DASHKV}, in Triton", 128, 64), (IN_TRITON, 128, 128)):
        one, kind = with_signs(layer), named[name]
        step = checked_step(case, rule(case, kind.selector), [one], Scratch(), triton=kind.triton)
        found = reads(case, step, [(one, 0)])
        heads = 2 if per == "kv_head" else 4
        assert found.kept == kept
        assert found.values <= heads * kept and found.keys <= heads * critical
        assert (found.norms > 0) == (critical < kept)


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keys", "600:100"], ["--keys", "at least 128 keys", "100"]),
        (["--bits", "512"], ["64, 128 or 256", "512"]),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(monkeypatch, capsys, arguments, words):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kinds, "measure_machine", lambda: pytest.fail("measured"))
    assert main(["bench", "kinds", *arguments]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_without_a_gpu_the_message_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kinds"]) == 2
    assert "NVIDIA GPU" in capsys.readouterr().err


def row(**changes):
    return {
        "shape": "32/8x128:bfloat16", "batch": 1, "keys": 131072, "k": 1024, "per": "kv_head", "bits": 64,
        "kind": "Tiers, 16 critical", "kernels": "Triton", "kept": 1024.0, "dense": "cuDNN", "speedup": 8.0,
        "us": {"flash": 190.0, "cuDNN": 180.0, "step": 22.5}, "of_topk": 1.5, "of_topk_in_triton": 1.25,
        "floor_us": 3.0, **changes,
    }  # fmt: skip


def test_the_table_has_a_line_a_kind():
    _, tiers, plain = tables.KINDS.text([row(), row(kind="TopK", of_topk_in_triton=None)]).splitlines()
    assert tiers.split()[-10:] == ["Triton", "1,024", "cuDNN", "180.0", "22.5", "8.00", "1.50", "1.25", "3.0", "7.5"]
    assert plain.split()[-3:] == ["-", "3.0", "7.5"]


def test_the_command_measures_one_case_and_writes_it(tmp_path, monkeypatch, capsys):
    asked = []
    result = {"read_GB_per_s": 3000.0, "notes": ["a remark"], "rows": [row()]}
    monkeypatch.setattr(kinds, "run", lambda cases, *how, **_: asked.append((list(cases), how)) or result)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    out = tmp_path / "x.json"
    assert main(["bench", "kinds", "--out", str(out)]) == 0
    assert asked == [([LARGE], (Settings(),))]
    assert "note: a remark" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["rows"] == [row()]
    assert {"command", "date", "device", "versions"} <= written.keys()
    assert main(["bench", "kinds", "--keys", "4000:200", "--batch", "2", "--per", "kv_head"]) == 0
    assert [(c.batch, c.keys, c.k) for c in asked[1][0]] == [(2, 4000, 200)]


# ---- for real


@pytest.mark.gpu
def test_a_small_case_is_measured(monkeypatch):
    from hashattn.lab.bench import cuda_inputs

    monkeypatch.setattr(cuda_inputs, "COLD", 1 << 20)
    result = kinds.run([Case(8, 2, 64, "bfloat16", 5000, 200, batch=2)], Settings(rounds=3))
    assert len(result["rows"]) == 13 + 11
    for r in result["rows"]:
        assert r["us"]["step"] > r["byte_floor_us"]
        assert r["kernels"] == "Triton" or not r["kind"].startswith(("Tiers", IN_TRITON))
        assert 100 < r["kept"] < 400
