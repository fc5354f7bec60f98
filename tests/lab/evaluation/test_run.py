"""The evaluation of a small random model: its figures are those of decoding token by token."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from hashattn import AsymmetricHash, HashAttention, HeavyHitters, ObservationWindow, PerLayer
from hashattn.cli import main
from hashattn.fitted.saving import save_pretrained
from hashattn.integrations.transformers import capture, facts_of
from hashattn.lab.evaluation.contenders import EXACT, FULL, contenders
from hashattn.lab.evaluation.continuation import judge
from hashattn.lab.evaluation.fidelity import own_text
from hashattn.lab.evaluation.perplexity import end_of_window, whole_window
from hashattn.lab.evaluation.report import markdown, summarise
from hashattn.lab.evaluation.retrieval import continuations
from hashattn.lab.evaluation.run import PARTS, Settings, run
from hashattn.lab.workload.retrieval import TASKS
from hashattn.lab.workload.texts import read_text
from tests.integrations.models import TENTH, forward
from tests.lab.evaluation.small import save, small_model, small_tokenizer

TINY = Settings(tokens=(400,), windows=2, questions=2, tasks=("needle",), sparse=12, decoded=30, queries=4)
HASH, DASHKV = "simhash_topk:sinks=2,recent=4", "dashkv:sinks=2,recent=4"


@pytest.fixture(scope="module")
def text():
    return read_text(None).share(0.5, 0.52)


@pytest.fixture(scope="module")
def records(text):
    entries = contenders([HASH], [0.1, 1.0], ["preset", "none"]) + contenders([DASHKV], [0.1], ["none"])[1:]
    with pytest.warns(UserWarning, match="is not fitted"):
        return run(small_model(), small_tokenizer(), text, entries, TINY)


def stepped(model, ids, asked, answer, attn):
    """NLL of an answer whose prompt [1, N] is dense up to `asked`; the rest is decoded one token at a time."""
    cache, logits = DynamicCache(config=model.config), []
    if asked:
        forward(model, ids[:, :asked], cache)
    rest = torch.cat([ids[:, asked:], answer[:, :-1]], 1)
    with attn.attach(model):
        for i in range(rest.shape[1]):
            logits.append(forward(model, rest[:, i : i + 1], cache)[0, -1])
    logits = torch.stack(logits[-answer.shape[1] :])
    return float(F.cross_entropy(logits, answer[0])), bool((logits.argmax(-1) == answer[0]).all())


@pytest.mark.parametrize("protocol", ["dense question", "sparse question"])
def test_answers_are_judged_as_if_decoded(protocol, text):
    model = small_model()
    question = TASKS["multikey"](small_tokenizer(), text.content, 220, seed=1, keys=2)
    found = continuations(model, question)[protocol]
    asked = question.asked if protocol == "sparse question" else question.ids.shape[1] - 1
    verdict = judge(model, found, TENTH)
    nll, correct = stepped(model, question.ids, asked, question.answer, TENTH)
    assert verdict.nll == pytest.approx(nll, abs=1e-5) and verdict.correct == correct
    assert 0.1 <= verdict.reads["keys_read"] < 0.12
    assert verdict.nll != pytest.approx(judge(model, found).nll, abs=1e-5)
    assert len(found.cache.layers[0].keys[0, 0]) == asked  # as it was


def test_what_the_model_would_write_is_correct(text):
    model = small_model()
    question = TASKS["needle"](small_tokenizer(), text.content, 300, seed=1)
    out = model.generate(question.ids, attention_mask=torch.ones_like(question.ids), max_new_tokens=4, do_sample=False)
    told = out[:, 300:]
    right = continuations(model, type(question)("needle", question.ids, question.asked, told, (), 0.5))
    wrong = continuations(model, type(question)("needle", question.ids, question.asked, told.flip(1) + 1, (), 0.5))
    assert all(judge(model, c).correct for c in right.values())
    assert not any(judge(model, c).correct for c in wrong.values())


def test_windows_are_judged_as_if_decoded():
    model, ids = small_model(), torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    nll, _ = stepped(model, ids[:, :40], 39, ids[:, 40:], TENTH)
    assert judge(model, end_of_window(model, ids, 20), TENTH).nll == pytest.approx(nll, abs=1e-5)
    nll, _ = stepped(model, ids[:, :1], 0, ids[:, 1:], TENTH)
    assert judge(model, whole_window(model, ids), TENTH).nll == pytest.approx(nll, abs=1e-5)
    with torch.no_grad():
        full = F.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:])
    assert judge(model, whole_window(model, ids)).nll == pytest.approx(float(full), abs=1e-5)


@pytest.mark.parametrize("selector", [HeavyHitters(share=0.2), ObservationWindow(share=0.2, window=8)], ids=repr)
def test_what_looks_back_is_there_during_the_prefill(selector):
    model, ids = small_model(), torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    window = end_of_window(model, ids, 20)
    attn = HashAttention(selector=selector, engine="reference")
    verdict = judge(model, window, attn)
    cache, logits = DynamicCache(config=model.config), []
    with attn.attach(model):
        forward(model, ids[:, :39], cache)
        for i in range(39, 59):
            logits.append(forward(model, ids[:, i : i + 1], cache)[0, -1])
    assert verdict.nll == pytest.approx(float(F.cross_entropy(torch.stack(logits), ids[0, 40:])), abs=1e-5)
    assert 0.15 < verdict.reads["sparse_keys_read"] < 0.45  # ObservationWindow keeps what was generated as well
    full = judge(model, window).nll
    assert verdict.nll != pytest.approx(full, abs=1e-5)
    whole = attn.replace(selector=HeavyHitters(share=1.0))
    assert judge(model, window, whole).nll == pytest.approx(full, abs=1e-5)


def test_an_index_that_cannot_be_fitted_to_so_few_keys_is_refused_before_anything_is_measured(text):
    model, entries = small_model(), contenders(["faiss_ivf"], [0.1])
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="'BIVF64' is fitted to 2496 keys"):
        run(model, small_tokenizer(), text, entries, TINY)


def test_a_window_shorter_than_its_end_is_refused():
    with pytest.raises(ValueError, match="sparse must be from 1 to 18 in windows of 20 tokens, got 19"):
        end_of_window(small_model(), torch.ones(1, 20, dtype=torch.int64), 19)


def test_every_window_and_question_meets_every_contender(records):
    count = {part: sum(r["part"] == part for r in records) for part in PARTS}
    assert count == {"tensors": 2 * 9, "perplexity": 2 * 10, "fidelity": 2 * 10, "retrieval": 2 * 2 * 10}
    assert {r["depth"] for r in records if r.get("task") == "needle"} == {0.25, 0.75}


def test_a_budget_of_everything_changes_nothing(records):
    everything = [r for r in records if r["budget"] == 1.0]
    full = {(r["part"], r.get("task"), r["unit"]): r["values"].get("nll") for r in records if r["contender"] == FULL}
    assert {r["part"] for r in everything} == {*PARTS}
    for record in everything:
        values = record["values"]
        assert values["keys_read"] == 1.0
        if record["part"] == "tensors":
            assert values["output_error"] < 1e-5 and values["recall"] == 1.0
        elif record["part"] == "fidelity":
            assert values["fidelity"] == 1.0
        else:
            nll = full[record["part"], record.get("task"), record["unit"]]
            assert values["nll"] == pytest.approx(nll, abs=1e-5)


def test_fidelity_is_how_often_full_attentions_own_token_is_chosen(records):
    found = [r for r in records if r["part"] == "fidelity"]
    assert {r["values"]["fidelity"] for r in found if r["contender"] == FULL} == {1.0}
    assert all(0 <= r["values"]["fidelity"] <= 1 for r in found)
    rows = [row for row in summarise(found) if row["contender"] != FULL]
    assert all(row["figures"]["fidelity"]["n"] == 2 for row in rows)
    model, window = small_model(), torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(2))
    written = own_text(model, window, 7)
    alone = model.generate(
        window, attention_mask=torch.ones_like(window), max_new_tokens=7, do_sample=False, eos_token_id=None
    )
    assert torch.equal(written.targets, alone[0, 60:]) and judge(model, written).matched == 1.0
    with pytest.raises(ValueError, match="decoded must be at least 1 for fidelity"):
        Settings(parts=("fidelity",), tokens=(400,), decoded=0)


def test_figures_follow_from_each_other(records):
    exact = {
        (r["part"], r.get("task"), r["protocol"], r["unit"], r["budget"], r["dense"]): r["values"]
        for r in records if r["contender"] == EXACT
    }  # fmt: skip
    for record in records:
        values = record["values"]
        if record["part"] in ("tensors", "fidelity") or record["contender"] == FULL:
            continue
        best = exact[tuple(record.get(n) for n in ("part", "task", "protocol", "unit", "budget", "dense"))]
        name = "ratio" if record["part"] == "perplexity" else "nll"
        if record["contender"] != EXACT:
            assert values[f"{name}_above_exact"] == pytest.approx(values[name] - best[name])
        searched = 68 / 400 if record["contender"] == EXACT and record["budget"] == 0.1 else record["budget"]  # forced
        assert values["sparse_keys_read"] == pytest.approx(searched, abs=0.03)
        if record["dense"] == "preset":  # layers 0 and 1 are dense
            assert values["keys_read"] == pytest.approx((2 + values["sparse_keys_read"]) / 3)


def test_layers_are_not_judged_for_what_looks_back(text):
    settings = Settings(parts=("tensors", "perplexity"), tokens=(400,), windows=1, sparse=12, decoded=0, queries=4)
    found = run(small_model(), small_tokenizer(), text, contenders(["h2o"], [0.1], ["none"]), settings)
    assert {r["part"] for r in found if r["contender"] == "h2o"} == {"perplexity"}
    assert {r["part"] for r in found if r["contender"] == EXACT} == {"tensors", "perplexity"}


def test_dense_layers_are_left_out_of_recall(records):
    layers = {(r["contender"], r["dense"]): [*r["layers"]] for r in records if r["part"] == "tensors"}
    assert layers[EXACT, "preset"] == [2] and layers[EXACT, "none"] == [0, 1, 2]
    assert layers[DASHKV, "none"] == [0, 1, 2]


def test_a_summary_is_the_mean_over_windows(records):
    row = next(r for r in summarise(records) if r["part"] == "perplexity" and r["contender"] == EXACT)
    ratios = [
        r["values"]["ratio"] for r in records
        if all(r.get(n) == row[n] for n in ("part", "contender", "budget", "dense"))
    ]  # fmt: skip
    assert row["figures"]["ratio"]["mean"] == pytest.approx(sum(ratios) / 2) and row["figures"]["ratio"]["n"] == 2
    assert row["figures"]["ratio"]["low"] is row["figures"]["ratio"]["high"] is None  # two values have no interval


def test_tables_name_everyone(records):
    shown = markdown(summarise(records))
    for words in (
        "### needle, sparse question, 400 tokens", "| perplexity ratio |", f"| {DASHKV} | 10% | none |",
        "| full attention |  |  | 1.0000",
    ):  # fmt: skip
        assert words in shown


def test_a_budget_of_its_own_is_beside_full_attention_alone(text):
    settings = Settings(parts=("perplexity",), tokens=(400,), windows=1, sparse=12)
    entries = contenders(["magicpig:sinks=2,recent=4"], [0.1], ["none"])
    found = run(small_model(), small_tokenizer(), text, entries, settings)
    values = next(r["values"] for r in found if r["contender"].startswith("magicpig"))
    assert values["ratio"] > 0 and "ratio_above_exact" not in values
    assert "| magicpig:sinks=2,recent=4 | own | none |" in markdown(summarise(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("recall",)}, r"parts must be among tensors, perplexity, fidelity, retrieval, got \['recall'\]"),
        ({"tokens": ()}, "tokens and seeds must be given"),
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"sparse": 329}, "sparse must be at most 328 for windows of 330 tokens, got 329"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"tokens": (330,), **changes})


def test_a_length_beyond_the_models_is_refused(text):
    with pytest.raises(ValueError, match=r"at most 864 for this model \(1024 positions, 160 .* got 1000"):
        run(small_model(), small_tokenizer(), text, contenders(["hata"], [0.1]), Settings(tokens=(1000,)))


def test_the_command_writes_figures_tables_and_pictures(tmp_path, capsys):
    folder, out = save(tmp_path / "model"), tmp_path / "eval.json"
    longbench = tmp_path / "longbench.jsonl"
    longbench.write_text(json.dumps({
        "_id": "7", "dataset": "hotpotqa", "input": "Who?", "context": "It was Ann. " * 30, "answers": ["Ann"],
        "all_classes": None, "length": 90, "language": "en",
    }), encoding="utf-8")  # fmt: skip
    command = ["eval", "--model", str(folder), "--presets", "simhash_topk:bits=32", "simhash_topk:bits=64", "--tokens",
               "400", "--windows", "1", "--questions", "1", "--tasks", "needle", "--decoded", "0", "--sparse", "8",
               "--queries", "2", "--budget", "0.3", "0.4", "--from", "0.5", "--to", "0.52", "--rows", "tensors",
               "perplexity", "retrieval", "--longbench", str(longbench), "--json", str(out),
               "--markdown", str(tmp_path / "eval.md"), "--plot", str(tmp_path / "plots"), "--simulate"]  # fmt: skip
    assert main(command) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["command"].startswith("hashattn eval --model") and result["share"] == [0.5, 0.52]
    assert {r["part"] for r in result["rows"]} == {"tensors", "perplexity", "retrieval", "benchmarks"}
    assert {r["protocol"] for r in result["rows"] if r["part"] == "perplexity"} == {"every position"}
    assert all(math.isfinite(v) for r in result["records"] for v in r["values"].values())
    assert (tmp_path / "eval.md").read_text(encoding="utf-8").strip() in capsys.readouterr().out
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    assert pictures == {"mass-budget.png", "mass-bits.png", "needle-nll.png", "needle-accuracy.png"}
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "hata:bit=3"], "takes no option 'bit'"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--longbench", "/no/such/file"], "/no/such/file cannot be read"),
        (["--from", "0.9", "--to", "0.1"], "shares of a text must be"),
        (["--encoder", "smollm2-135m", "--presets", "streaming"], "taken by none of the presets streaming"),
    ],
)
def test_bad_input_ends_the_command_before_a_model_is_loaded(arguments, message, capsys):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_fitted_encoders_are_judged_by_the_presets_that_take_them(tmp_path, text):
    model, tokenizer = small_model(), small_tokenizer()
    ids = torch.randint(3, 90, (1, 300), generator=torch.Generator().manual_seed(0))
    layers = [AsymmetricHash(64, query_hidden=()).fit(c.q, c.k, steps=2) for c in capture(model, ids).values()]
    folder = str(save_pretrained(PerLayer(layers, facts_of(model)), tmp_path / "fitted"))
    settings = Settings(parts=("tensors",), tokens=(400,), windows=1, decoded=0, queries=4)
    entries = contenders(["simhash_topk", "dashkv_fast"], [0.2], ["none"], folder)
    assert "pretrained" not in entries[1].options and isinstance(entries[2].composition(400).encoder, PerLayer)
    values = {r["contender"]: r["values"] for r in run(model, tokenizer, text, entries, settings)}  # and no warning
    by_option = contenders([f"dashkv_fast:pretrained={folder}"], [0.2], ["none"])
    again = run(model, tokenizer, text, by_option, settings)[-1]["values"]
    assert again == values["dashkv_fast"] and 0 < again["ranked_recall"] < 1
    with pytest.raises(ValueError, match="head_dim"):
        run(small_model(head_dim=8), tokenizer, text, entries, settings)
