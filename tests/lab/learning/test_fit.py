import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hashattn import AsymmetricHash, HashAttention, from_pretrained
from hashattn.cli import main
from hashattn.encoders import fitting
from hashattn.lab.learning.fit import fit_layers, held_out
from hashattn.lab.learning.fit_folder import FitFolder
from hashattn.lab.learning.recipe import Recipe
from hashattn.lab.learning.shards import Shards
from hashattn.lab.recall import recall_and_mass
from tests.lab.learning.shards import FACTS, LAYERS, make
from tests.structured import qkv, raises_naming

QUICK = Recipe(bits=32, query_hidden=(8,), steps=30, queries=8, every=10, lr=1e-2)
ARGUMENTS = ["--bits", "32", "--query-hidden", "8", "--steps", "30", "--queries", "8", "--every", "10", "--lr", "0.01"]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return Shards.open(make(tmp_path_factory.mktemp("captured") / "shards"))


@contextlib.contextmanager
def one_thread():
    """As processes of their own have: sums of floats are then the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fitted(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "out"
    with one_thread():
        assert fit_layers(shards, out, QUICK) == out / "pretrained"
    return out


def record(out, layer=1):
    return json.loads((out / f"layer-{layer:02d}.json").read_text())


def weights(out):
    return {p.name: p.read_bytes() for p in sorted(out.rglob("[!.]*.safetensors"))} | {
        "config.json": (out / "pretrained" / "config.json").read_bytes()
    }


def start(shards, out, *more, **environment):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "hashattn.cli", "fit", str(shards.folder), "--out", str(out), *ARGUMENTS, *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
def test_every_layer_is_fitted_and_finds_more_than_before(shards, fitted):
    loaded = from_pretrained(fitted / "pretrained")
    assert loaded.encoder.layers == LAYERS
    assert loaded.facts == FACTS
    kept = held_out(shards, QUICK.held_out)
    for layer in LAYERS:
        samples = [s for s in shards.layer(layer) if s.name in kept]
        encoder = loaded.encoder.layer(layer)
        found = recall_and_mass(encoder, samples, budget=0.05)
        assert found == pytest.approx((record(fitted, layer)["recall"], record(fitted, layer)["mass"]))
        assert found[0] > recall_and_mass(QUICK.make(layer, 2), samples, budget=0.05)[0] + 0.05
    assert loaded.fitted_on["held_out"]["layers"]["2"]["recall"] == record(fitted, 2)["recall"]
    assert loaded.fitted_on["recipe"] == QUICK.as_json()
    attn = HashAttention.from_preset(
        "dashkv", pretrained=fitted / "pretrained", dense_layers=(0, 3), engine="reference"
    )
    q, k, v = qkv(0, keys=100)
    assert attn.layer(4)(q, k, v).isfinite().all()


def test_the_log_holds_every_look_and_the_curves_are_drawn(fitted):
    log = json.loads((fitted / "log.json").read_text())
    assert [r["layer"] for r in log["layers"]] == [*LAYERS]
    for one in log["layers"]:
        assert [look["step"] for look in one["looks"]] == [10, 20, 30]
        best = max(one["looks"], key=lambda look: look["recall"])
        assert one["best_step"] == best["step"]
    assert (fitted / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_layers_differ_only_through_their_own_seed_and_data(shards, fitted, tmp_path):
    with one_thread():
        fit_layers(shards, tmp_path / "alone", QUICK, layers=[2])
    name = "layer-02.safetensors"
    assert (tmp_path / "alone" / name).read_bytes() == (fitted / name).read_bytes()
    assert QUICK.make(1, 2).seed != QUICK.make(2, 2).seed


def test_the_held_out_sequences_are_never_fitted_to(shards, tmp_path):
    changed = tmp_path / "shards"
    shutil.copytree(shards.folder, changed)
    (kept,) = held_out(shards, QUICK.held_out)
    donor = next(s for s in shards.sequences if s.name != kept)
    for layer in LAYERS:
        shutil.copy(shards.path(donor, layer), changed / kept / f"layer-{layer:02d}.safetensors")
    recipe = Recipe(**{**QUICK.as_json(), "query_hidden": (8,), "every": 30})  # one look: no choice of a best state
    for name, captured in (("a", shards), ("b", Shards.open(changed))):
        fit_layers(captured, tmp_path / name, recipe, layers=[1])
    a, b = tmp_path / "a", tmp_path / "b"
    assert (a / "layer-01.safetensors").read_bytes() == (b / "layer-01.safetensors").read_bytes()
    assert record(a)["recall"] != record(b)["recall"]


@pytest.mark.parametrize(
    ("kinds", "share", "names"),
    [
        ("text text text text", 0.25, ["003-text"]),
        ("text text", 0.1, ["001-text"]),
        ("text text needle needle", 0.5, ["001-text", "003-needle"]),
        ("text needle copy", 0.9, ["001-needle", "002-copy"]),  # something has to be left to fit to
    ],
)
def test_the_last_sequences_of_each_kind_are_held_out(tmp_path, kinds, share, names):
    shards = Shards.open(make(tmp_path / "s", tuple(kinds.split())))
    assert sorted(held_out(shards, share)) == names


def test_a_layer_stops_early_and_keeps_its_best_state(shards, tmp_path, monkeypatch):
    recalls, states = iter([0.2, 0.5, 0.4, 0.5, 0.9]), []

    def measured(encoder, samples, index, budget):
        states.append(fitting.state_of(encoder))
        return next(recalls), 0.9

    monkeypatch.setattr("hashattn.lab.learning.fit.recall_and_mass", measured)
    recipe = Recipe(bits=32, query_hidden=(), steps=100, queries=8, every=10, patience=2)
    fit_layers(shards, tmp_path / "out", recipe, layers=[1])
    found = record(tmp_path / "out")
    assert ([look["step"] for look in found["looks"]], found["stopped_early"], found["best_step"]) == (
        [10, 20, 30, 40], True, 20,
    )  # fmt: skip
    kept = FitFolder(tmp_path / "out").encoder(1, FACTS).state_dict()
    for name, tensor in states[1].items():
        assert torch.equal(kept[name], tensor.half().float())


@pytest.mark.parametrize("kind", ["symmetric", "itq"])
def test_other_encoders_are_fitted_too(shards, tmp_path, kind):
    recipe = Recipe(encoder=kind, bits=32, query_bits=4, steps=10, queries=8)
    loaded = from_pretrained(fit_layers(shards, tmp_path / "out", recipe))
    assert loaded.encoder.layers == LAYERS
    assert (loaded.encoder.bits, loaded.encoder.query_bits) == (32, 4)
    assert record(tmp_path / "out")["recall"] > 0.2


def test_weights_of_its_own_for_each_head_and_a_bias(shards, tmp_path):
    recipe = Recipe(bits=64, bias_bits=8, query_hidden=(), heads="kv", steps=4, queries=8)
    encoder = from_pretrained(fit_layers(shards, tmp_path / "out", recipe, layers=[2])).encoder.layer(2)
    assert isinstance(encoder, AsymmetricHash)
    assert (encoder.heads, encoder.bias_bits, encoder.bits) == (2, 8, 64)


def test_a_killed_fit_goes_on_as_if_nothing_had_been(shards, fitted, tmp_path):
    out = tmp_path / "out"
    process = start(shards, out)
    while process.poll() is None and not (out / "layer-01.json").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "pretrained").exists(), "it was too quick to be killed"
    first = (out / "layer-01.json").stat().st_mtime_ns
    (out / "layer-02.safetensors").write_bytes(b"half")  # whatever moment it was killed at
    with one_thread():
        fit_layers(shards, out, QUICK)
    assert (out / "layer-01.json").stat().st_mtime_ns == first  # done: left alone
    assert weights(out) == weights(fitted)


def test_two_processes_share_the_layers_and_the_last_one_saves(shards, fitted, tmp_path):
    out = tmp_path / "out"
    both = [start(shards, out, RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r)) for r in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert any("mean" in text and f'pretrained="{out / "pretrained"}"' in text for text, _ in said)
    assert weights(out) == weights(fitted)


def test_a_layer_that_another_process_fits_is_not_fitted_twice(shards, fitted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(fitted, out)
    (out / "layer-02.json").unlink()
    with FitFolder(out).fitting([2, 3]):
        raises_naming(ValueError, "layer 2", str(out), f"process {os.getpid()} on ")(
            lambda: fit_layers(shards, out, QUICK)
        )
    with one_thread():
        assert fit_layers(shards, out, QUICK) == out / "pretrained"
    assert weights(out) == weights(fitted)
    assert not [*out.glob(".*")]


def test_damaged_records_are_fitted_again_and_a_damaged_run_is_named(shards, fitted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(fitted, out)
    for damage in ("", "{", "[]", "[" * 50_000, json.dumps(record(out, 2) | {"recall": True})):
        (out / "layer-02.json").write_text(damage)
        assert FitFolder(out).record(2) is None
    for damage, word in (("[]", "object"), ("{", "cannot be read"), ('{"a": NaN}', "NaN")):
        (out / "run.json").write_text(damage)
        raises_naming(ValueError, "run.json", word)(lambda: fit_layers(shards, out, QUICK))


def test_a_process_leaves_the_layers_of_others_alone(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fit", str(shards.folder), "--out", str(tmp_path / "out"), *ARGUMENTS, "--device", "cpu"]) == 0
    assert "process 1 of 2 is done" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").glob("layer-*.json")) == ["layer-02.json"]
    monkeypatch.setenv("RANK", "one")
    assert main(["fit", str(shards.folder), "--out", str(tmp_path / "out"), *ARGUMENTS]) == 2
    assert "RANK" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(shards, tmp_path, monkeypatch):
    combined, calls = fitting.combined, []

    def breaks(weights, batch):
        calls.append(batch)
        value = combined(weights, batch)
        return value * torch.nan if len(calls) == 45 else value  # step 14 of the second layer

    monkeypatch.setattr(fitting, "combined", breaks)
    out = tmp_path / "out"
    raises_naming(RuntimeError, "layer 2", "step 14", "last-good", "lr")(lambda: fit_layers(shards, out, QUICK))
    assert sorted(p.name for p in out.glob("*.json")) == ["layer-01.json", "layer-02.last-good.json", "run.json"]
    good = json.loads((out / "layer-02.last-good.json").read_text())
    assert [look["step"] for look in good["looks"]] == [10]
    assert FitFolder(out).record(2) is None
    assert fit_layers(shards, out, QUICK) == out / "pretrained"  # and nothing is lost


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.02}, ["lr is 0.02 here and 0.01 there"]),
        ({"encoder": "symmetric", "query_hidden": None}, ["encoder is 'symmetric' here and 'asymmetric' there"]),
    ],
)
def test_a_folder_of_another_fit_is_refused_with_both_values(shards, fitted, change, words):
    recipe = Recipe(**{**QUICK.as_json(), "query_hidden": (8,), **change})
    before = weights(fitted)
    raises_naming(ValueError, str(fitted), *words)(lambda: fit_layers(shards, fitted, recipe))
    raises_naming(ValueError, "layers is [1] here and [1, 2, 4] there")(
        lambda: fit_layers(shards, fitted, QUICK, layers=[1])
    )
    assert weights(fitted) == before


def test_shards_that_are_others_are_refused(fitted, tmp_path):
    other = Shards.open(make(tmp_path / "s", ("text", "text")))
    raises_naming(ValueError, "sequences is")(lambda: fit_layers(other, fitted, QUICK))


def test_what_cannot_be_fitted_is_refused_before_anything_is_written(shards, tmp_path):
    def fit(captured=shards, **options):
        return lambda: fit_layers(captured, tmp_path / "out", options.pop("recipe", QUICK), **options)

    raises_naming(ValueError, "[1, 2, 4]", "[3]")(fit(layers=[3]))
    raises_naming(ValueError, "[]")(fit(layers=[]))
    raises_naming(ValueError, "rank", "2")(fit(rank=2, world=2))
    raises_naming(ValueError, "two or more", "1 sequence")(fit(Shards.open(make(tmp_path / "one", ("text",)))))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    raises_naming(ValueError, "mine.txt")(fit())
    (tmp_path / "file").write_text("mine")
    raises_naming(ValueError, "is a file")(lambda: fit_layers(shards, tmp_path / "file", QUICK))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder": "pq"}, ["encoder", "'pq'", "symmetric"]),
        ({"heads": "all"}, ["heads", "'all'", "kv"]),
        ({"encoder": "itq", "heads": "kv"}, ["itq", "heads"]),
        ({"encoder": "itq", "bias_bits": 8}, ["bias_bits", "itq"]),
        ({"encoder": "itq", "query_hidden": ()}, ["query_hidden", "itq"]),
        ({"loss": "hinge"}, ["hinge", "ranking"]),
        ({"bits": 3}, ["bits", "3"]),
        ({"query_bits": 3}, ["query_bits", "3"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"patience": -1}, ["patience", "-1"]),
        ({"lr": float("nan")}, ["lr", "nan"]),
        ({"held_out": 1}, ["held_out"]),
        ({"budget": 0}, ["budget", "0"]),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_name(options, words):
    raises_naming(ValueError, *words)(lambda: Recipe(**options))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--query-hidden", "8", "none"], ["--query-hidden", "8 none"]),
        (["--loss", "kl + 2"], ["kl + 2"]),
        (["--layers", "7"], ["[7]"]),
        (["--bits", "9999"], ["bits", "9999"]),
    ],
)
def test_the_command_refuses_in_one_line(shards, tmp_path, capsys, more, words):
    assert main(["fit", str(shards.folder), "--out", str(tmp_path / "out"), *ARGUMENTS, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hashattn fit: ") and error.count("\n") == 1
    assert all(word in error for word in words)
    assert not (tmp_path / "out").exists()


def test_no_shards_are_refused(tmp_path, capsys):
    assert main(["fit", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
