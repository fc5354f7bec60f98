import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hashattn import Decoder, FlatHamming, HashAttention, LocalTopK, TopK
from hashattn.cli import main
from hashattn.lab.bench import cuda, cuda_drift, cuda_graphs, cuda_plot, cuda_steps, tables
from hashattn.lab.bench.arguments import cuda_cases
from hashattn.lab.bench.cases import CUDA_KEYS, CUDA_SHAPES, Case, Settings
from hashattn.lab.bench.cuda_check import check_dense, check_rounding, check_step, check_whole, exact_output
from hashattn.lab.bench.cuda_contenders import row_distances
from hashattn.lab.bench.cuda_inputs import layer_count, make_layer, step_count, with_estimate, with_signs
from hashattn.lab.bench.cuda_reads import reads
from hashattn.lab.bench.cuda_steps import encoders, first_bounds, rule, selectors, whole, whole_caches
from hashattn.lab.bench.floors import Machine, Reads, code_bytes, floors, popcounts, step_bytes
from hashattn.ops import decode
from hashattn.ops.decode import Rule, Scratch, reference
from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.reference import choose
from hashattn.ops.hamming import unpack_bits
from tests.structured import raises_naming

ROOT = Path(__file__).parents[3]
SMALL = Case(4, 2, 16, "float32", 300, 40, batch=2)
LARGE = Case(32, 8, 128, "bfloat16", 131072, 1024)
ALL = Reads(1024, 32 * 1024, 32 * 1024)  # no two heads share a key


SHARED = rule(SMALL, selectors(SMALL, "kv_head")["TopK"])


def small_layer(rule, clustered=False):
    layer = make_layer(SMALL, 64, steps=2, clustered=clustered, seed=0, device=torch.device("cpu"))
    return layer, first_bounds(layer, rule)


def spec(layer, rule):
    return reference(replace(layer.inputs(0, rule), estimate=None))[:3]


def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- arguments


def test_without_sizes_the_default_cases_are_measured():
    cases = cuda_cases(CUDA_SHAPES, None, None)
    assert [(c.batch, c.keys, c.k) for c in cases] == list(CUDA_KEYS)
    assert {c.shape for c in cases} == {"32/8x128:bfloat16"}


def test_given_sizes_are_combined():
    cases = cuda_cases(["4/2x64:float16"], [1, 3], ["600:50", "700:60"])
    assert [(c.batch, c.keys, c.k) for c in cases] == [(1, 600, 50), (1, 700, 60), (3, 600, 50), (3, 700, 60)]
    assert [(c.batch, c.keys) for c in cuda_cases(CUDA_SHAPES, [2], ["600:50"])] == [(2, 600)]
    assert {c.batch for c in cuda_cases(CUDA_SHAPES, [8], None)} == {8}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], ["--batch", "0"]),
        (["--keys", "600:601"], ["--keys", "600:601"]),
        (["--plot", "/no/such/folder/x.png"], ["--plot", "/no/such/folder"]),
        (["--bits", "100"], ["--bits", "64, 128 or 256", "100"]),
        (["--bits", "512"], ["64, 128 or 256", "512"]),
        (["--shape", "4/2x80:float16"], ["head_dim", "80"]),
        (["--shape", "32/1x64:float16"], ["query heads a KV head", "32"]),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "measure_machine", lambda: pytest.fail("measured"))
    assert main(["bench", "gpu", *arguments]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


@pytest.mark.parametrize("arguments", [["--batch", "2"], ["--clustered"], ["--plot", "x.png"]])
def test_what_only_a_gpu_is_measured_with_is_refused_on_the_cpu(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(["bench", "cpu", *arguments])
    assert end.value.code == 2 and f"unrecognized arguments: {arguments[0]}" in capsys.readouterr().err


def test_without_a_gpu_the_message_says_what_to_do(monkeypatch, capsys):
    without_a_gpu(monkeypatch)
    assert main(["bench", "gpu"]) == 2
    message = capsys.readouterr().err
    for word in ("NVIDIA GPU", "CUDA build", torch.__version__, "bench cpu"):
        assert word in message


def test_a_missing_matplotlib_is_missed_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(cuda, "run", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "gpu", "--plot", "x.png"]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


# ---- what is measured


def test_layers_are_more_than_a_cache_holds_and_fit_the_memory():
    assert step_bytes(LARGE, 64, ALL) == 8 * 131072 * 8 + 32 * 1024 * 2 * 256
    assert step_bytes(LARGE, 128, Reads(1024, 100, 300, 200)) == 8 * 131072 * 16 + 400 * 256 + 200 * 2
    for batch, keys, k in CUDA_KEYS:
        for bits in (64, 128, 256):
            case = Case(32, 8, 128, "bfloat16", keys, k, batch=batch)
            count = layer_count(case, bits)
            assert count >= 3
            assert count * code_bytes(case, bits) >= 200 << 20
            assert count * (case.dense_bytes + code_bytes(case, bits)) <= 40 << 30
            assert count * step_count(count) >= 12
            assert step_count(count) >= 2
    assert layer_count(Case(32, 8, 128, "bfloat16", 1 << 24, 256), 64) == 1  # memory comes first


def test_floors_are_those_of_bytes_and_popcounts():
    found = floors(LARGE, 64, "query_head", Machine(read=3e12, processors=132, clock=1.5e9), ALL)
    assert found["byte_floor_us"] == pytest.approx((8388608 + 16777216) / 3e6)
    assert found["popcount_floor_us"] == pytest.approx(2 * 32 * 131072 / (16 * 132 * 1500))
    assert found["floor_us"] == found["byte_floor_us"]
    assert found["dense_floor_us"] == pytest.approx(2 * 8 * 131072 * 256 / 3e6)
    more = floors(LARGE, 256, "query_head", Machine(3e13, 132, 1.5e9), ALL)
    assert more["popcount_floor_us"] == pytest.approx(4 * found["popcount_floor_us"])
    assert more["floor_us"] == more["popcount_floor_us"]
    unknown = floors(LARGE, 64, "query_head", Machine(3e12, 132, None), ALL)
    assert unknown["popcount_floor_us"] is None
    assert unknown["floor_us"] == unknown["byte_floor_us"]


@pytest.mark.parametrize(
    ("q_heads", "per", "planes", "counts"),
    [
        (32, "query_head", 1, 32), (32, "query_head", 2, 2 * 32), (32, "kv_head", 1, 2 * 8), (32, "kv_head", 2, 3 * 8),
        (24, "kv_head", 1, 2 * 8), (8, "kv_head", 1, 8), (128, "kv_head", 1, 4 * 8),
    ],
)  # fmt: skip
def test_a_group_needs_a_popcount_for_each_digit_of_its_weights(q_heads, per, planes, counts):
    case = Case(q_heads, 8, 128, "bfloat16", 1000, 100)
    assert popcounts(case, 128, per, planes) == 4 * 1000 * counts


def test_what_is_read_is_counted_once_for_a_group():
    layer, _ = small_layer(SHARED)
    ids = torch.full((2, 4, 1, 6), -1, dtype=torch.int32)
    ids[:, 0, 0, :3] = torch.tensor([5, 6, 7])
    ids[:, 1, 0, :2] = torch.tensor([7, 9])  # of the same KV head
    ids[:, 2, 0, :2] = torch.tensor([7, 299])
    tier = torch.zeros_like(ids, dtype=torch.int8)
    tier[:, 0, 0, 2] = tier[:, 2, 0, 0] = 1  # column 7: medium to head 0 and critical to head 1; medium to head 2
    assert reads(SMALL, lambda *_: (None, None, ids), [(layer, 0)]) == Reads(7 / 4, 12, 12)
    assert reads(SMALL, lambda *_: (None, None, ids, tier), [(layer, 0)]) == Reads(7 / 4, 10, 12, 4)
    taken = iter([ids, ids[..., :2]])
    assert reads(SMALL, lambda *_: (None, None, next(taken)), [(layer, 0), (layer, 1)]) == Reads(6.5 / 4, 12, 12)


def test_queries_of_two_planes_are_an_encoders_with_the_signs_of_one():
    case, device = Case(4, 2, 16, "float32", 6400, 50), torch.device("cpu")
    for clustered in (False, True):
        layer = make_layer(case, 64, steps=2, clustered=clustered, seed=0, device=device, planes=2)
        plain = make_layer(case, 64, steps=2, clustered=clustered, seed=0, device=device)
        assert layer.query[0].shape == (1, 4, 1, 2, 1)
        assert torch.equal(layer.codes, plain.codes)
        found = row_distances(layer, False)
        assert torch.equal(found, row_distances(with_signs(layer), False))
        assert all(query.is_contiguous() and query.shape == (1, 4, 1, 1, 1) for query in with_signs(layer).query)
        assert ((found < 20).float().mean() > 0.01) == clustered
        planes = unpack_bits(torch.cat(layer.query), 64)[..., 0, :, :]
        large = (planes[..., 0, :] == planes[..., 1, :]).float().mean()  # at least half of the query's largest
        assert 0.1 < large < 0.4


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_near_keys_of_a_clustered_layer_are_neighbours(per):
    case = Case(4, 2, 16, "float32", 6400, 50)
    layer = make_layer(case, 64, steps=2, clustered=True, seed=0, device=torch.device("cpu"))
    nearest = row_distances(layer, per == "kv_head").topk(50, largest=False).indices
    assert nearest.shape == (2 if per == "kv_head" else 4, 50)
    inside = (nearest >= 3200) & (nearest < 3300)
    assert inside.float().mean() > 0.9


# ---- the checks before it


@pytest.mark.parametrize(
    "selector",
    [*selectors(SMALL, "query_head").values(), TopK(k=40, per="kv_head"), LocalTopK(k=304)],  # more than there are
    ids=str,
)
@pytest.mark.parametrize("clustered", [False, True])
def test_a_right_step_passes(selector, clustered):
    asked = rule(SMALL, selector)
    layer, bounds = small_layer(asked, clustered)
    check_step(lambda: spec(layer, asked), layer, bounds, asked, SMALL)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda out, lse, ids: (out, lse, ids + 1), ["selects other keys"]),
        (lambda out, lse, ids: (out * 1.001, lse, ids), ["off by"]),
        (lambda out, lse, ids: (out.fill_(torch.nan), lse, ids), ["off by"]),
        (lambda out, lse, ids: (out, lse + 1e-6 * torch.rand_like(lse), ids), ["its own hint", "other bits"]),
    ],
)
def test_a_wrong_step_is_not_measured(wrong, words):
    layer, bounds = small_layer(SHARED)
    raises_naming(RuntimeError, *words, "nothing is measured")(
        lambda: check_step(lambda: wrong(*spec(layer, SHARED)), layer, bounds, SHARED, SMALL)
    )


def tiers_spec(layer, rule):
    return reference(layer.inputs(0, rule))[:4]


@pytest.mark.parametrize("shared", [False, True])
def test_tiers_are_checked_with_their_estimates(shared):
    asked = Rule(share=0.2, critical=0.1, shared=shared, sinks=2)
    layer, bounds = small_layer(asked)
    layer = with_estimate(layer)
    check_step(lambda: tiers_spec(layer, asked), layer, bounds, asked, SMALL)
    twice = replace(layer, estimate=replace(layer.estimate, a=2 * layer.estimate.a))
    exact = spec(layer, asked)[0]
    for wrong, words in (
        (lambda out, lse, ids, tier: (out, lse, ids, 1 - tier), "other keys are critical"),
        (lambda out, lse, ids, tier: (out, lse, ids, tier.zero_()), "other keys are critical"),
        (lambda out, lse, ids, tier: (out, lse, ids + 1, tier), "selects other keys"),
        (lambda out, lse, ids, tier: (exact, lse, ids, tier), "off by"),
        (lambda out, lse, ids, tier: tiers_spec(twice, asked), "off by"),
    ):
        raises_naming(RuntimeError, words, "nothing is measured")(
            lambda wrong=wrong: check_step(lambda: wrong(*tiers_spec(layer, asked)), layer, bounds, asked, SMALL)
        )


def test_a_critical_key_weighs_enough_to_be_checked():
    case = Case(8, 2, 128, "bfloat16", 4000, 256)
    layer = with_estimate(make_layer(case, 64, steps=1, clustered=False, seed=0, device=torch.device("cpu")))
    asked = Rule(share=0.064, critical=0.001)  # 4 of 256 keys
    ids, critical = choose(layer.inputs(0, asked))
    exact, size = exact_output(layer, ids, ~critical & (ids >= 0))
    without = ids.masked_fill(critical, -1)
    other, _ = exact_output(layer, without, without >= 0)
    raises_naming(RuntimeError, "off by")(lambda: check_rounding("it", other.bfloat16(), exact, size))


@pytest.mark.parametrize("selector", [TopK(k=40, per="kv_head"), LocalTopK(k=48)], ids=str)
def test_a_step_that_believes_its_hints_is_not_measured(selector):
    asked = rule(SMALL, selector)
    layer, bounds = small_layer(asked)

    def step():
        out, lse, ids = spec(layer, asked)
        return out, lse, ids - (bounds[(asked.chunks or 1) - 1].view(ids.shape[:3])[..., None] > 0).int()

    raises_naming(RuntimeError, "a huge hint", "selects other keys")(
        lambda: check_step(step, layer, bounds, asked, SMALL)
    )


@pytest.mark.parametrize("name", ["linear", "MLP"])
def test_a_whole_step_is_the_reference_but_for_a_few_heads(monkeypatch, name):
    pytest.importorskip("triton")
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))
    step = Decoder.__call__
    case = Case(4, 2, 64, "float32", 300, 40)
    layer = make_layer(case, 64, steps=2, clustered=False, seed=0, device=torch.device("cpu"))
    caches = whole_caches(case, encoders(64)[name], [layer], room=8, scratch=Scratch())
    attn = HashAttention(caches[0].encoder, FlatHamming(), TopK(k=40, per="kv_head"), engine="gpu")
    check_whole("it", attn, caches[0], layer)
    assert len(caches[0]) == 301
    call = whole(attn, [layer], caches)
    assert all(call(layer, i).shape == layer.q[i].shape for i in range(2))
    for wrong in (lambda out: out + 1, lambda out: out * torch.nan, lambda out: out.flip(1)):
        monkeypatch.setattr(Decoder, "__call__", lambda *a, wrong=wrong: wrong(step(*a)))
        raises_naming(RuntimeError, "it agrees with the reference", "of heads only", "nothing is measured")(
            lambda: check_whole("it", attn, caches[0], layer)
        )


def test_wrong_dense_attention_is_not_measured():
    layer, _ = small_layer(SHARED)
    exact = torch.nn.functional.scaled_dot_product_attention(layer.q[0], layer.keys, layer.values, enable_gqa=True)
    check_dense("it", exact, layer, SMALL)
    for wrong in (exact * 1.001, exact * torch.nan):
        raises_naming(RuntimeError, "it is off by")(lambda wrong=wrong: check_dense("it", wrong, layer, SMALL))


# ---- results


DRIFT = {"steps": 1000, "missed_per_1000": 3.0, "p50_us": 9.5, "p99_us": 11.5, "max_us": 540.0}


def row(keys=8192, **changes):
    us = {
        "SDPA flash": 20.0, "Triton": 18.0, "step": 9.0, "scan": 4.0, "attend": 5.0, "linear": 10.0, "MLP": 12.0,
        "torch.topk": 30.0,
    }  # fmt: skip
    return {
        "shape": "32/8x128:bfloat16", "batch": 1, "keys": keys, "k": 256, "per": "kv_head", "bits": 64, "us": us,
        "selector": "TopK", "kernels": "Triton", "dense": "Triton", "speedup": 2.0,
        "whole_speedup": {"linear": 1.8, "MLP": 1.5}, "floor_us": 3.0, "drift": DRIFT, **changes,
    }  # fmt: skip


def test_the_table_has_a_line_a_case():
    head, line = tables.GPU.text([row()]).splitlines()
    assert head.split()[:7] == ["shape", "batch", "keys", "k", "selector", "per", "bits"]
    assert line.split()[:7] == ["32/8x128:bfloat16", "1", "8,192", "256", "TopK", "kv_head", "64"]
    times = [
        "Triton",
        "Triton",
        "18.0",
        "9.0",
        "2.00",
        "4.0",
        "5.0",
        "3.0",
        "9.5",
        "11.5",
        "540.0",
        "3.0",
        "3.0",
    ]
    assert line.split()[7:] == [*times, "10.0", "1.80", "12.0", "1.50", "30.0", "-"]


def test_the_picture_is_written_whole(tmp_path):
    cuda_plot.save_plot([row(), row(32768), row(per="query_head"), row(batch=8)], tmp_path / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_writes_how_its_results_came_about(tmp_path, monkeypatch, capsys):
    result = {"read_GB_per_s": 3000.0, "notes": ["a remark"], "rows": [row()]}
    monkeypatch.setattr(cuda, "run", lambda *_, **__: result)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    out, plot = tmp_path / "x.json", tmp_path / "x.png"
    assert main(["bench", "gpu", "--out", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "Encoding the query and the newest key is not part of the step" in printed
    assert "note: a remark" in printed
    written = json.loads(out.read_text())
    assert written["device"] == "a GPU"
    assert {"triton", "cuda", "torch"} <= written["versions"].keys()
    assert written["command"].startswith("hashattn bench gpu")
    assert written["rows"] == [row()]
    assert plot.exists()


@pytest.fixture
def pretended(monkeypatch):
    """A run on the CPU: the specification is the step, every graph is a list of calls that were made once."""
    make = make_layer
    monkeypatch.setattr(cuda_graphs, "make_layer", lambda *a, device, **o: make(*a, device=torch.device("cpu"), **o))
    monkeypatch.setattr(cuda_graphs, "layer_count", lambda *_: 3)
    monkeypatch.setattr(cuda, "refuse", lambda *_: None)
    monkeypatch.setattr(cuda, "why_not", lambda *_: None)  # head_dim 16
    monkeypatch.setattr(cuda, "selectors", lambda case, per: {"TopK": TopK(k=case.k, per=per)})
    for module in (cuda, cuda_steps):
        monkeypatch.setattr(module, "kernels", lambda: "CUDA C++")
    monkeypatch.setattr(cuda, "measure_machine", lambda: Machine(1e12, 100, None))
    monkeypatch.setattr(cuda_graphs, "capture", lambda calls: [call() for call in calls])
    monkeypatch.setattr(cuda, "take_turns", lambda graphs, calls, _: {n: 50.0 - i for i, n in enumerate(graphs)})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda, "faiss_us", lambda *_: 70.0)
    monkeypatch.setattr(cuda_drift, "measure", lambda *_: dict(DRIFT))

    def unserved(q, keys, values):
        raise NotImplementedError("not this shape\nat all")

    def sdpa(q, keys, values):
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    monkeypatch.setattr(cuda_graphs, "dense", lambda: {"a": sdpa, "unserved": unserved, "b": sdpa})

    def fused(layer, i, bounds, rule, scratch, scan_only=False, triton=False):
        return reference(layer.inputs(i, rule))[:3]

    monkeypatch.setattr(cuda_graphs, "fused", fused)
    monkeypatch.setattr(cuda_graphs, "check_whole", lambda _, attn, cache, layer: attn.parts.check_cache(cache))
    monkeypatch.setattr(cuda_graphs, "whole", lambda *_: lambda layer, i: None)


def test_ratios_are_those_of_the_times_and_what_does_not_serve_is_noted(pretended):
    result = cuda.run([SMALL], Settings(rounds=1))
    assert [r["per"] for r in result["rows"]] == ["query_head", "kv_head"]
    for r in result["rows"]:
        assert r["us"].keys() >= {"a", "b", "step", "scan", "attend", "linear", "MLP", "torch.topk"}
        assert (r["selector"], r["dense"], r["layers"], r["calls"], r["batch"]) == ("TopK", "b", 3, 12, 2)
        assert r["kernels"] == "CUDA C++"
        assert r["speedup"] == 49 / 48
        assert r["whole_speedup"] == {"linear": 49 / 46, "MLP": 49 / 45}
        assert r["us"]["attend"] == r["us"]["step"] - r["us"]["scan"]
    assert ["FAISS" in r["us"] for r in result["rows"]] == [True, False]
    assert "unserved is left out at 4/2x16:float32: not this shape" in result["notes"]
    assert "no popcount floor: the clock is not known" in result["notes"]
    assert len(tables.GPU.text(result["rows"]).splitlines()) == 3


def test_each_selector_that_is_served_has_a_row_of_its_own(pretended, monkeypatch):
    choices = {"TopK": TopK(k=40), "fewer": TopK(k=20), "unserved": TopK(k=30)}
    monkeypatch.setattr(cuda, "selectors", lambda *_: choices)
    monkeypatch.setattr(cuda, "why_not", lambda _, __, s: "it is new" if s == choices["unserved"] else None)
    result = cuda.run([SMALL], Settings(pers=["query_head"], rounds=1))
    assert [(r["selector"], r["us"]["step"], r["us"]["MLP"]) for r in result["rows"]] == [
        ("TopK", 48.0, 45.0), ("fewer", 44.0, 41.0),
    ]  # fmt: skip
    assert all(r["dense"] == "b" and r["speedup"] == 49 / r["us"]["step"] for r in result["rows"])
    assert "unserved is left out per query_head: it is new" in result["notes"]


@pytest.mark.parametrize(
    ("capability", "reason", "expected"),
    [((9, 0), None, "CUDA C++"), ((9, 0), "it cannot be compiled", "Triton"), ((7, 5), None, "Triton")],
)
def test_a_row_says_which_kernels_ran(monkeypatch, capability, reason, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compiler, "why_not", lambda: reason)
    monkeypatch.setattr(compiler, "why_not_on", lambda _: None)
    assert cuda_steps.kernels() == expected


@pytest.mark.parametrize(("written_in", "kernels"), [("CUDA C++", 1), ("Triton", 2)])
def test_a_step_of_one_kernel_has_no_stages(pretended, monkeypatch, written_in, kernels):
    monkeypatch.setattr(cuda, "selectors", selectors)
    for module in (cuda, cuda_steps):
        monkeypatch.setattr(module, "kernels", lambda: written_in)
    exact, local = cuda.run([SMALL], Settings(pers=["query_head"], rounds=1))["rows"]
    assert (exact["selector"], local["selector"], local["kernels"]) == ("TopK", "LocalTopK", written_in)
    assert {"scan", "attend"} <= exact["us"].keys()
    assert len({"scan", "attend"} & local["us"].keys()) == (0 if kernels == 1 else 2)
    line = tables.GPU.text([local]).splitlines()[1].split()
    assert exact["drift"] == DRIFT and local["drift"] is None
    assert (line.count("-") == 6) == (kernels == 1)


def test_below_the_warm_up_there_is_no_whole_step(pretended):
    (row,) = cuda.run([Case(4, 2, 16, "float32", 200, 40)], Settings(pers=["kv_head"], rounds=1))["rows"]
    assert row["whole_speedup"] == {}
    assert tables.GPU.text([row]).split()[-6:] == ["-", "-", "-", "-", "46.0", "-"]


def test_a_run_ends_where_a_dense_contender_is_wrong(pretended, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "dense", lambda: {"wrong": lambda q, keys, values: q})
    monkeypatch.setattr(cuda, "take_turns", lambda *_: pytest.fail("measured"))
    raises_naming(RuntimeError, "wrong is off by", "nothing is measured")(lambda: cuda.run([SMALL], Settings()))


# ---- for real


@pytest.mark.gpu
@pytest.mark.parametrize("clustered", [False, True])
def test_a_small_case_is_measured(monkeypatch, clustered):
    from hashattn.lab.bench import cuda_inputs

    monkeypatch.setattr(cuda_inputs, "COLD", 1 << 20)
    case = Case(8, 2, 64, "bfloat16", 5000, 200, batch=2)
    result = cuda.run([case], Settings(clustered=clustered, rounds=3))
    served = [("TopK", "query_head"), ("LocalTopK", "query_head"), ("TopK", "kv_head")]
    assert [(r["selector"], r["per"]) for r in result["rows"]] == served
    assert any(note.startswith("LocalTopK is left out per kv_head") for note in result["notes"])
    for r in result["rows"]:
        us = r["us"]
        assert us[r["dense"]] == min(t for name, t in us.items() if name.startswith(("SDPA", "Triton")))
        assert r["kernels"] in ("CUDA C++", "Triton")
        assert ("scan" in us) == (r["selector"] == "TopK" or r["kernels"] == "Triton")
        assert 0 < us.get("scan", 1e-3) < us["step"]
        assert us["step"] > r["byte_floor_us"]
        assert us["step"] < min(us["linear"], us["MLP"])
        assert (r["drift"] is None) == (r["selector"] == "LocalTopK")
        assert {"Triton", "torch.topk"} <= us.keys()
    assert result["read_GB_per_s"] > 100


@pytest.mark.gpu
def test_nothing_is_measured_where_the_kernels_are_wrong(monkeypatch):
    right = cuda_graphs.fused
    monkeypatch.setattr(cuda_graphs, "fused", lambda *a, **o: (1.1 * right(*a, **o)[0], *right(*a, **o)[1:]))
    monkeypatch.setattr(cuda, "take_turns", lambda *_: pytest.fail("measured"))
    raises_naming(RuntimeError, "off by", "nothing is measured")(
        lambda: cuda.run([Case(8, 2, 64, "bfloat16", 5000, 200)], Settings())
    )
