"""`hashattn bench generate` with tiny models on a CPU: its checks find what is wrong, its figures are generate()'s."""

import contextlib
import itertools
import json
import time

import pytest
import torch

from hashattn import HashAttention, TopK
from hashattn.cli import main
from hashattn.core.errors import UserError
from hashattn.lab.bench import generate, generate_check
from hashattn.lab.bench.generate_clock import CHUNK, ONE_PASS, Call, timed
from hashattn.lab.bench.generate_contenders import Contender, contenders, every_key
from hashattn.lab.bench.generate_models import NAMED_SHAPES, Source, check_positions, random_prompt
from tests.structured import raises_naming

pytest.importorskip("transformers")
CPU = torch.device("cpu")
PRESET = "simhash_topk:engine=cpu"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models on a busy machine wait for threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    return Source(shape="tiny").make(CPU)


def attached(preset=PRESET, **options):
    return contenders([preset], 0.05, compiled=False, **options)[1]


def test_the_command_measures_the_model_as_it_is_and_presets(tmp_path, capsys):
    out = tmp_path / "generate.json"
    command = ["bench", "generate", "--device", "cpu", "--no-compile", "--tokens", "400", "--batch", "1", "2"]
    presets = ["--preset", PRESET, "--preset", "full", "--lossless"]
    assert main([*command, "--steps", "4", *presets, "--out", str(out)]) == 0
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert (found["model"], found["weights"], found["dtype"]) == ("tiny, 3 layers", "random", "float32")
    assert found["failed"] == {} and found["command"].startswith("hashattn bench generate")
    labels = ["stock, dynamic", f"{PRESET}, dynamic", "full, dynamic", f"{PRESET}, lossless", "full, lossless"]
    assert [(r["label"], r["batch"]) for r in found["rows"]] == [(x, b) for b in (1, 2) for x in labels]
    for row in found["rows"]:
        stock = next(r for r in found["rows"] if r["label"] == labels[0] and r["batch"] == row["batch"])
        assert row["keys"] == 400 and 0 < row["ms"] <= row["slowest_ms"] and row["p99_ms"] <= row["slowest_ms"]
        assert row["first_token_ms"] <= row["slowest_ms"] and row["prefill_ms"] > 0
        assert row["times_stock_dynamic"] == pytest.approx(stock["ms"] / row["ms"])
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["times_stock_static"] is None and row["memory_bytes"] is None
        assert ("lossless" in row["label"]) == any("drafts: " in line for line in row["report"] or ())
    one = found["rows"][1]
    assert one["keys_read"] < 0.8 and one["searching_layers"] == 1  # two of three layers are dense
    assert any("cpu: engine" in line for line in one["report"])
    assert labels[1] in shown and "x dynamic" in shown


def test_a_contender_that_writes_something_else_has_no_figure_and_the_status_says_so(tmp_path, capsys, monkeypatch):
    out = tmp_path / "generate.json"
    few = every_key(HashAttention.from_preset("simhash_topk")).replace(selector=TopK(k=300))
    monkeypatch.setattr(generate_check, "every_key", lambda attn: attn if attn.selector is None else few)
    command = ["bench", "generate", "--device", "cpu", "--no-compile", "--tokens", "400", "--steps", "2"]
    assert main([*command, "--preset", PRESET, "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert [row["label"] for row in found["rows"]] == ["stock, dynamic"]
    assert "logits are off by" in found["failed"][f"{PRESET}, dynamic"]
    assert f"note: {PRESET}, dynamic is left out: with a budget of every key" in capsys.readouterr().out


def test_the_check_passes_what_attends_to_every_key_in_every_dtype():
    for dtype in ("float32", "bfloat16"):
        model = Source(shape="tiny", dtype=dtype).make(CPU)
        everyone = contenders(["simhash_topk:query_bits=2", "oracle_topk", "h2o", "full"], 0.01, compiled=False)
        assert generate_check.failing(model, everyone) == {}


def test_a_preset_that_does_not_search_is_not_taken_for_checked(tiny, monkeypatch):
    dense = HashAttention.from_preset("simhash_topk", dense_layers=(0, 1, 2), engine="cpu")
    monkeypatch.setattr(generate_check, "every_key", lambda attn: dense)
    (why,) = generate_check.failing(tiny, [Contender(None, False), attached()]).values()
    assert why == "no layer searched: dense_layers"


def test_tokens_after_a_near_tie_are_not_compared():
    logits = torch.tensor([[[1.0, 2.0]], [[1.0, 1.0]], [[0.0, 9.0]]])  # [T, B, vocabulary]
    other = torch.tensor([[[1.0, 2.0]], [[1.0, 1.0]], [[9.0, 0.0]]])
    stock, tied = (torch.tensor([[1, 0, 1]]), logits), (torch.tensor([[1, 1, 0]]), other)
    assert generate_check._off(stock, tied) == 0.0
    assert generate_check._off(stock, (stock[0], other)) == pytest.approx(2**0.5)
    assert generate_check._off(stock, (stock[0], other * torch.nan)) == float("inf")


def test_the_clock_tells_the_prefill_from_the_tokens_after_it(tiny, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks) ** 2))
    ids = random_prompt(tiny, 2, 40)
    found = timed(tiny, ids, Call(static=False), 4)
    assert found.prefill == 1.0 and found.steps == [3.0, 5.0, 7.0] and found.memory is found.peak is None


def test_a_prompt_that_is_read_in_chunks_is_answered_alike(tiny):
    ids = random_prompt(tiny, 2, 300)
    whole, chunked = (tiny.generate(ids, **Call(static=False, chunk=chunk).arguments(ids, 6)) for chunk in (None, 128))
    assert whole.shape == (2, 306) and torch.equal(whole, chunked)


@pytest.mark.parametrize(
    ("asked", "batch", "tokens", "expected"),
    [
        (None, 1, ONE_PASS, None),
        (None, 2, ONE_PASS, CHUNK),
        (100, 1, 300, 100),
        (100, 1, 301, 101),
        (100, 1, 100, None),
    ],
)
def test_long_prompts_are_read_in_chunks_none_of_which_is_one_token(asked, batch, tokens, expected):
    assert Call(static=False, chunk=asked).chunk_of(batch, tokens) == expected


def test_static_caches_are_compiled_wherever_they_are():
    ids = torch.zeros(1, 10, dtype=torch.long)
    given = Call(static=True).arguments(ids, 2)
    assert given["cache_implementation"] == "static" and given["compile_config"]._compile_all_devices
    assert "cache_implementation" not in Call(static=False).arguments(ids, 2)


def test_the_ways_and_what_they_are_called():
    found = contenders(["full", "hata"], 0.01, compiled=True)
    assert [c.label for c in found] == [
        f"{name}, {way}" for name in ("stock", "full", "hata") for way in ("dynamic", "static, compiled")
    ]
    assert found[0].composition(1000) is None
    assert found[-1].composition(10_000).selector.budget(10_000) == 100


def test_graph_is_given_to_attach_only_where_it_is_named(tiny, monkeypatch):
    asked = []

    def attach(self, model, **options):
        asked.append(options)
        return contextlib.nullcontext("the handle")

    monkeypatch.setattr(HashAttention, "attach", attach)
    for graph, expected in ((None, {}), ("always", {"graph": "always"})):
        one = attached(graph=graph)
        with one.attached(tiny, one.composition(400)) as found:
            assert found == (tiny, "the handle")
        assert asked.pop() == expected


def test_what_does_not_fit_the_memory_is_noted_and_the_others_go_on(monkeypatch):
    def measure(settings, network, contender, ids):
        if contender.preset is None:
            raise torch.OutOfMemoryError("no room")
        if len(ids) == 2:
            raise RuntimeError("broken\nin two lines")
        steps = [0.5] * generate.SETTLING + [0.25, 0.125]
        call = generate.Timed(2.0, steps, 10, 20)
        return generate.Measured(call, call, None)

    monkeypatch.setattr(generate, "_measure", measure)
    kept = []
    settings = generate.Settings(Source(), [300], [1, 2], [PRESET], compiled=False)
    found = generate.run(settings, CPU, progress=False, keep=lambda result: kept.append(len(result["rows"])))
    assert found["notes"] == [f"stock, dynamic: {b} sequences of 300 keys do not fit the memory" for b in (1, 2)]
    assert found["failed"] == {f"{PRESET}, dynamic, 2 sequences of 300 keys": "broken"}
    (row,) = found["rows"]
    assert (row["ms"], row["slowest_ms"], row["memory_bytes"]) == (187.5, 500.0, 10)
    assert row["times_stock_dynamic"] is None and kept == [0, 1, 1, 1]


def test_models_are_made_as_asked_and_no_token_ends_their_texts():
    model = Source(shape="smollm2-135m", layers=2, dtype="bfloat16").make(CPU)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 576, 9)
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id is None
    assert Source(shape="llama-3-8b").for_checks() == Source(shape="llama-3-8b", layers=4)
    assert Source(shape="tiny").for_checks().make(CPU).config.num_hidden_layers == 3
    assert Source(model="smollm2-135m").for_checks() == Source(model="smollm2-135m")
    sizes = {name: size.weight_bytes / 2e9 for name, size in NAMED_SHAPES.items()}  # billions of weights
    assert sizes["llama-3-8b"] == pytest.approx(8.03, abs=0.01) and sizes["mistral-7b"] == pytest.approx(7.24, abs=0.02)


def test_more_tokens_than_a_model_has_positions_are_refused(tiny):
    check_positions(tiny, 1 << 20)
    raises_naming(ValueError, "--tokens", "1,048,577", "1,048,576 positions")(
        lambda: check_positions(tiny, (1 << 20) + 1)
    )


def test_an_argument_that_attach_does_not_know_is_refused_before_any_work(monkeypatch):
    def attach(self, model):
        pass

    monkeypatch.setattr(HashAttention, "attach", attach)
    monkeypatch.setattr(generate, "failing", lambda *_: pytest.fail("work is done"))
    settings = generate.Settings(Source(), [300], [1], [PRESET], compiled=False, graph="always")
    raises_naming(UserError, "graph")(lambda: generate.run(settings, CPU, progress=False))


@pytest.mark.gpu
def test_all_ways_are_measured_on_a_gpu(tmp_path):
    out = tmp_path / "generate.json"
    command = ["bench", "generate", "--shape", "tiny", "--tokens", "2000", "--batch", "2", "--steps", "8"]
    assert main([*command, "--preset", "simhash_topk:bits=64,engine=gpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 4 and found["failed"] == {}
    for row in found["rows"]:
        assert (row["memory_bytes"] > 0 and row["times_stock_static"] is not None) or row["label"] == "stock, dynamic"
        assert row["searching_layers"] == (1 if "simhash" in row["label"] else 0)
