"""`hashattn bench recall`: presets on the same queries and keys."""

import importlib.util
import json
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hashattn import (
    PRESETS,
    FaissBinary,
    FlatHamming,
    HashAttention,
    MultiProbe,
    Selection,
    Step,
    TopK,
    from_pretrained,
)
from hashattn.cli import main
from hashattn.lab import kept
from hashattn.lab.bench import recall, recall_steps
from hashattn.lab.bench.recall_data import captured, synthetic
from hashattn.lab.bench.recall_entries import SHIPPED, arguments, entries, parse_index, shipped_for
from hashattn.lab.bench.recall_report import on_front, save_plot, table
from tests.lab.evaluation.small import save
from tests.structured import attention64, raises_naming, visible_mask

KEYS, QUERIES = 640, 6
SMALL = ["bench", "recall", "--data", "synthetic", "--tokens", str(KEYS), "--queries", str(QUERIES)]


@pytest.fixture(scope="module")
def layer():
    return synthetic(KEYS, QUERIES)


def preset(name, **options):
    return HashAttention.from_preset(name, **options).replace(engine="cpu")


def truth_of(layer):
    return kept.Truth.of(layer.q[:, :, -QUERIES:], layer.k, layer.v, layer.scale)


def judged(attn, layer):
    decoded = recall_steps.decode(attn, layer, QUERIES)
    return decoded, kept.figures(decoded.kept, decoded.out, truth_of(layer))


def test_the_command_compares_writes_and_draws(tmp_path, capsys):
    out, plot = tmp_path / "recall.json", tmp_path / "recall.png"
    presets = ["simhash_topk", "streaming", "full"]
    assert main([*SMALL, "--presets", *presets, "--budget", "0.15", "--out", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert plot.stat().st_size > 1000
    found = json.loads(out.read_text())
    assert found["command"].startswith("hashattn bench recall")
    assert found["settings"]["budget"] == 0.15
    assert found["notes"] == []
    rows = {row["preset"]: row for row in found["rows"]}
    assert [*rows] == presets
    for row in rows.values():
        assert (row["data"], row["keys"], row["q_heads"], row["kv_heads"], row["head_dim"]) == (
            "synthetic", KEYS, 9, 3, 64,
        )  # fmt: skip
        assert 0 < row["us"] < float("inf")
        assert 0 < row["dense_us"] < float("inf")
        assert row["dense_bytes"] == 2 * 3 * KEYS * 64 * 2
        assert [one["layer"] for one in row["layers"]] == [15]
        assert row["preset"] in printed
    assert (rows["simhash_topk"]["key_bytes"], rows["streaming"]["key_bytes"]) == (16, 0)
    assert rows["simhash_topk"]["keys_read"] == pytest.approx(0.15, abs=0.01)
    assert rows["simhash_topk"]["scan_bytes"] == 16 * 3 * KEYS
    assert rows["simhash_topk"]["relative_mass"] > 2 * rows["streaming"]["relative_mass"]  # .86 and .16 seen
    assert rows["full"]["relative_mass"] == 1
    assert rows["full"]["budget"] is None
    assert rows["full"]["output_error"] < 1e-5
    assert "full (own budget)" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is measured where there is a GPU")
def test_without_a_gpu_nothing_is_measured_on_one(capsys):
    assert main([*SMALL, "--device", "cuda"]) == 2
    assert "bench recall --device cuda needs an NVIDIA GPU" in capsys.readouterr().err


def test_tables_in_markdown_are_made_from_the_file(tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "recall_tables.py"
    spec = importlib.util.spec_from_file_location("recall_tables", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "recall.json"
    assert main([*SMALL, "--presets", "streaming", "--out", str(out)]) == 0
    lines = module.sections(module.read([out])).splitlines()
    assert lines[0] == "### synthetic"
    assert lines[-1].startswith("| streaming | - | 5.")
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_exact_top_k_keeps_what_exact_top_k_keeps_and_everything_is_full_attention(layer):
    _, found = judged(preset("oracle_topk").replace(selector=TopK(share=0.15)), layer)
    assert (found["recall"], found["relative_mass"]) == (pytest.approx(1), pytest.approx(1))
    decoded, found = judged(preset("simhash_topk", share=1.0), layer)
    assert found["keys_read"] == found["recall"] == found["relative_mass"] == 1
    assert found["mass"] == pytest.approx(1)
    mask = visible_mask(QUERIES, KEYS, [0])
    exact, p = attention64(layer.q[:, :, -QUERIES:], layer.k, layer.v, mask, layer.scale)
    truth = truth_of(layer)
    torch.testing.assert_close(truth.out, exact[0])
    torch.testing.assert_close(truth.p, p[0])
    assert float((decoded.out - exact[0]).norm() / exact.norm()) == pytest.approx(found["output_error"])
    assert found["output_error"] < 1e-5


@pytest.mark.parametrize("name", ["simhash_topk", "oracle_topk"])
def test_steps_keep_what_one_call_of_all_queries_keeps(layer, name):
    attn = preset(name, share=0.15)
    decoded = recall_steps.decode(attn, layer, QUERIES)
    cache = attn.new_cache(1, 3, 64)
    cache.append(layer.k, layer.v)
    output, selection = attn.run(layer.q[:, :, -QUERIES:], cache)
    assert torch.equal(kept.kept_by(selection, decoded.kept), decoded.kept)
    torch.testing.assert_close(output.out[0], decoded.out, atol=1e-5, rtol=1e-4)
    assert len(decoded.us) == len(decoded.after) == QUERIES
    assert all(step.layer == 16 for step in decoded.after)


def test_a_layer_goes_by_the_one_before(layer):
    attn = preset("dashkv_momentum", share=0.15)
    attn.encoder.fit(layer.fit_q, layer.fit_k, steps=2)
    attn.selector.ranked_part.discount.data.fill_(1000.0)
    ids = torch.arange(100, 120, dtype=torch.int32).expand(1, 9, 1, -1)
    before = [Step(0, Selection(ids), torch.full(ids.shape, 0.05))] * QUERIES
    assert recall_steps.decode(attn, layer, QUERIES, before).kept[..., 100:120].all()
    assert not recall_steps.decode(attn, layer, QUERIES).kept[..., 100:120].all()


@pytest.mark.parametrize("attn", [preset("snapkv", k=128), preset("h2o", share=0.2)])
def test_selectors_that_look_back_are_shown_the_prefill(layer, attn):
    kept = recall_steps.decode(attn, layer, QUERIES).kept
    first, last = kept[:, 0], kept[:, -1]
    assert int(first.sum(-1).max()) <= 129  # those who saw nothing keep all
    assert not (last & ~first)[:, : KEYS - QUERIES].any()  # what is left out stays out
    assert last[:, -1].all()


def test_nothing_is_reported_where_the_engine_keeps_other_keys(layer, monkeypatch):
    from hashattn.ops.compiled.step import Step

    right = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *a: (x := right(*a))._replace(ids=(x.ids + 1) % (KEYS - QUERIES)))
    raises_naming(RuntimeError, "selects other keys", "cpu")(
        lambda: recall_steps.decode(preset("simhash_topk"), layer, QUERIES)
    )


def test_every_preset_runs_on_every_budget_it_takes():
    """Of those in PRESETS, whatever they are: none is left out or refused."""
    result = recall.run(recall.Settings(data=("synthetic",), tokens=KEYS, queries=2, train=1))
    assert [row["preset"] for row in result["rows"]] == [*PRESETS]
    assert result["notes"] == []
    assert all(0 < row["relative_mass"] <= 1 + 1e-9 for row in result["rows"])
    shown = table(result["rows"])
    assert all(name in shown for name in PRESETS)


def test_another_index_is_one_argument():
    settings = recall.Settings(
        data=("synthetic",),
        presets=("simhash_topk", "oracle_topk"),
        tokens=KEYS,
        queries=2,
        index='FaissBinary("BFlat")',
    )
    result = recall.run(settings)
    own, other, exact = result["rows"]
    assert [row["preset"] for row in (own, other, exact)] == [
        "simhash_topk", 'simhash_topk + FaissBinary("BFlat")', "oracle_topk",
    ]  # fmt: skip
    for name in ("keys_read", "recall", "mass", "relative_mass", "output_error"):
        assert own[name] == pytest.approx(other[name], rel=1e-6)  # compiled loops, and stages: sums in another order
    (remark,) = result["notes"]
    assert "oracle_topk" in remark
    assert "FlatDot()" in remark


def test_indexes_are_read_as_python_writes_them_and_nothing_else_is_called():
    assert parse_index('FaissBinary("BHNSW32", ef_search=64)') == FaissBinary("BHNSW32", ef_search=64)
    assert parse_index("MultiProbe(2, 8, 4)") == MultiProbe(2, 8, 4)
    assert parse_index("FlatHamming()") == FlatHamming()
    for text in ("FlatHamming", "1 +", "os.system('x')", "FaissBinary(open('x'))", "(lambda: 1)()"):
        raises_naming(ValueError, "--index", "FaissBinary", text)(lambda text=text: parse_index(text))
    raises_naming(ValueError, "HashAttention", "FlatHamming")(lambda: parse_index("HashAttention()"))
    raises_naming(ValueError, "Index", "FlatHamming")(lambda: parse_index("Index()"))
    raises_naming(ValueError, "FlatHamming", "bits")(lambda: parse_index("FlatHamming(bits=3)"))
    raises_naming(ValueError, "BFoo", "BFlat")(lambda: parse_index('FaissBinary("BFoo")'))


def test_an_index_that_fits_nothing_is_refused():
    raises_naming(ValueError, "--index FlatPQ()", "simhash_topk", "binary")(
        lambda: entries(["streaming", "simhash_topk"], 0.05, "FlatPQ()")
    )


def test_encoders_of_the_library_serve_the_presets_that_would_train_the_same():
    dashkv, fast = (arguments(HashAttention.from_preset(name).encoder) for name in ("dashkv", "dashkv_fast"))
    held = {name: arguments(from_pretrained(name).encoder.layer(5)) for name in ("smollm2-135m", "smollm2-135m-fast")}
    assert held == {"smollm2-135m": dashkv, "smollm2-135m-fast": fast}
    assert dashkv != fast
    entry, *_ = entries(["dashkv_fast"], 0.1)[0]
    layer = replace(synthetic(KEYS, QUERIES), number=5)
    attn, weights = entry.fitted(layer, shipped_for("smollm2-135m"), {}, steps=1, seed=0)
    assert weights == SHIPPED
    mine = from_pretrained("smollm2-135m-fast").encoder.layer(5).state_dict()
    assert all(torch.equal(mine[name], weight) for name, weight in attn.encoder.state_dict().items())
    entry, *_ = entries(["dashkv_fast:pretrained=smollm2-135m-fast"], 0.1)[0]
    given, weights = entry.fitted(layer, [], {}, steps=1, seed=0)
    assert weights == "given"
    assert torch.equal(*(recall_steps.decode(x.replace(engine="cpu"), layer, 2).kept for x in (given, attn)))
    assert [len(shipped_for(name)) for name in ("smollm2-135m", "synthetic", "smollm2")] == [2, 0, 2]


def test_presets_share_what_is_learned_and_fit_the_rest(layer):
    listed, _ = entries(["dashkv", "dashkv_consensus", "hata", "simhash_topk"], 0.1)
    memo = {}
    found = [entry.fitted(layer, [], memo, steps=1, seed=0) for entry in listed]
    assert found[0][0].encoder is found[1][0].encoder
    assert len(memo) == 2
    assert [weights for _, weights in found] == ["trained here, 1 steps"] * 3 + [""]
    assert all(attn.encoder.fitted for attn, _ in found[:3])


def test_layers_of_a_model_and_texts_that_do_not_overlap(tmp_path):
    g = torch.Generator().manual_seed(0)
    letters = [string.ascii_lowercase[i] for i in torch.randint(26, (4000,), generator=g).tolist()]
    text = tmp_path / "text.txt"
    text.write_text("".join(letters))
    layers = captured(str(save(tmp_path / "model")), 400, None, str(text), 0)
    assert [one.number for one in layers] == [0, 1, 2]
    for one in layers:
        assert one.q.shape[2] == one.k.shape[2] == one.fit_k.shape[2] == one.fit_q.shape[2] == 400
        assert not torch.equal(one.k, one.fit_k)
        assert one.scale == pytest.approx(one.k.shape[3] ** -0.5)
    (chosen,) = captured(str(tmp_path / "model"), 400, [1], str(text), 0)
    assert torch.equal(chosen.q, layers[1].q)
    raises_naming(ValueError, "layers", "[0, 1, 2]", "[7]")(
        lambda: captured(str(tmp_path / "model"), 400, [7], str(text), 0)
    )


def test_synthetic_keys_are_repeatable_hold_planted_neighbours_and_share_a_mean(layer):
    again, other = synthetic(KEYS, QUERIES), synthetic(KEYS, QUERIES, seed=1)
    assert torch.equal(again.k, layer.k)
    assert not torch.equal(other.k, layer.k)
    assert not torch.equal(layer.fit_k, layer.k)
    truth = truth_of(layer)
    share = float(truth.p.topk(32, -1).values.sum(-1).mean())
    assert share > 0.75  # .86 seen: 5% of the keys
    mean = layer.k.mean(2).norm(dim=-1) / layer.k.norm(dim=-1).mean(2)
    assert bool((mean > 0.5).all())  # .72 to .79 seen


def test_fronts_hold_what_nothing_beats(tmp_path):
    def row(name, mass, us, engine="cpu"):
        return {
            "data": "d", "preset": name, "relative_mass": mass, "us": us, "key_bytes": 1, "read_bytes": 1,
            "dense_bytes": 2, "engine": engine,
        }  # fmt: skip

    rows = [row("a", 0.9, 10), row("b", 0.8, 10), row("c", 0.8, 5), row("d", 0.95, 20), row("e", 1.0, 1, "dense")]
    assert [one["preset"] for one in rows if on_front(one, rows, "us")] == ["a", "c", "d"]
    save_plot(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--queries", "0"], ["--queries", "0"]),
        (["--queries", "400"], ["--tokens", "400", "640"]),
        (["--train", "0"], ["--train", "0"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--presets", "dashcam"], ["dashcam", "dashkv"]),
        (["--plot", "/nowhere/at/all.png"], ["--plot", "/nowhere/at"]),
        (["--index", "FlatPQ()", "--presets", "simhash_topk"], ["FlatPQ()", "simhash_topk"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(given, words, capsys):
    assert main([*SMALL, *given]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
