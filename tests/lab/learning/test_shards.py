import dataclasses
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hashattn.lab.learning import Shards
from tests.damage import refused, spoil_json, spoil_tensors
from tests.lab.learning.small import SHORT, small_capture
from tests.structured import raises_naming


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    small_capture(folder, dataclasses.replace(SHORT, sequences=2, layers=(1, 3)))
    return folder


@pytest.fixture
def folder(captured, tmp_path):
    """A copy to spoil."""
    for path in captured.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(captured)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


def describe(folder, **changes):
    path = folder / "capture.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_samples_come_in_float32_and_in_the_order_of_the_sequences(captured):
    shards = Shards.open(captured)
    assert (shards.layers, [s.name for s in shards.sequences]) == ((1, 3), ["text-000", "text-001"])
    for layer in shards.layers:
        for sample, sequence in zip(shards.layer(layer), shards.sequences, strict=True):
            held = load_file(captured / sequence.name / f"layer-{layer:02d}.safetensors")
            assert (held["q"].dtype, held["positions"].dtype) == (torch.float16, torch.int32)
            assert torch.equal(sample.k, held["k"].float()) and torch.equal(sample.q, held["q"].float())
            assert (sample.positions.dtype, sample.name, sample.kind) == (torch.int64, sequence.name, "text")
            assert (sample.prefill, sample.k.shape[1]) == (60, 63)
    assert repr(shards) == f"Shards({str(captured)!r}: llama, 2 layers, 2 sequences, 126 tokens)"


def test_layers_and_kinds_that_are_not_there_are_named(captured):
    shards = Shards.open(captured)
    raises_naming(ValueError, "layer 2", "[1, 3]")(lambda: shards.layer(2))
    raises_naming(ValueError, "['text']", "['needle', 'text']")(lambda: shards.layer(1, kinds=("text", "needle")))
    assert len(shards.layer(1, kinds=("text",))) == 2


def test_another_model_is_named(captured):
    shards = Shards.open(captured)
    shards.check(dataclasses.replace(shards.facts, name="the same by another name"))
    other = dataclasses.replace(shards.facts, name="larger", kv_heads=8)
    raises_naming(ValueError, "llama", "larger", "kv_heads is 8 here and 2 there")(lambda: shards.check(other))


@pytest.mark.parametrize("name", ["layer-03.safetensors", "tokens.safetensors"])
def test_files_that_are_missing_or_cut_short_are_named(folder, name):
    path = folder / "text-001" / name
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        raises_naming(ValueError, str(path), "cut short", "hashattn capture")(lambda: Shards.open(folder))
    path.unlink()
    raises_naming(ValueError, str(path), "missing", "hashattn capture")(lambda: Shards.open(folder))


def test_a_file_that_is_cut_short_after_opening_is_named(folder):
    shards, path = Shards.open(folder), folder / "text-000" / "layer-01.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    raises_naming(ValueError, str(path), "cut short")(lambda: shards.layer(1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda k: k[:, :-1]),
        ("k", lambda k: k[:1]),
        ("q", lambda q: q[:, :-1]),
        ("q", lambda q: q[..., :8]),
        ("positions", lambda p: p[:-1]),
    ],
)
def test_other_shapes_than_the_model_gives_are_refused(folder, name, change):
    path = folder / "text-001" / "layer-01.safetensors"
    held = load_file(path)
    save_file({**held, name: change(held[name]).contiguous()}, path)
    raises_naming(ValueError, str(path), "expected")(lambda: Shards.open(folder))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k"])
def test_values_that_are_not_finite_are_refused(folder, name, value):
    path = folder / "text-001" / "layer-01.safetensors"
    held = load_file(path)
    held[name][1, 3, 2] = value
    save_file(held, path)
    shards = Shards.open(folder)
    shards.layer(3)
    raises_naming(ValueError, str(path), f"{name} holds values that are not finite")(lambda: shards.layer(1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, ["format_version", "2", "1"]),
        ({"layers": [1, 9]}, ["layers", "[1, 9]"]),
        ({"layers": None}, ["another type"]),
        ({"dtype": "float8"}, ["float16", "'float8'"]),
        ({"model": {"name": "x"}}, ["model facts"]),
        ({"sequences": [{"name": "text-000"}]}, ["missing"]),
        (
            {
                "sequences": [
                    {"name": "../up", "kind": "text", "source": "", "tokens": 1, "asked": 1, "decoded": 0, "seed": 0}
                ]
            },
            ["../up"],
        ),
        (
            {
                "sequences": [
                    {"name": "a", "kind": "text", "source": "", "tokens": 3, "asked": 4, "decoded": 0, "seed": 0}
                ]
            },
            ["asked <= tokens"],
        ),
        (
            {
                "sequences": [
                    {"name": "a", "kind": "text", "source": "", "tokens": "1", "asked": 1, "decoded": 0, "seed": 0}
                ]
            },
            ["'1'"],
        ),
    ],
)
def test_a_damaged_description_is_refused(folder, changes, words):
    describe(folder, **changes)
    raises_naming(ValueError, "capture.json", *words)(lambda: Shards.open(folder))


def test_a_folder_without_a_capture_is_refused(folder, tmp_path):
    raises_naming(ValueError, "nowhere", "hashattn capture")(lambda: Shards.open(tmp_path / "nowhere"))
    for damaged in ("", "{", "[]", "{}"):
        (folder / "capture.json").write_text(damaged)
        raises_naming(ValueError, "capture.json")(lambda: Shards.open(folder))


@pytest.mark.parametrize("seed", range(6))
def test_damage_of_any_kind_is_a_value_error_and_takes_no_memory(captured, tmp_path, seed):
    chance, refusals = random.Random(seed), 0
    for i in range(15):
        spoiled = tmp_path / str(i)
        shutil.copytree(captured, spoiled)
        if chance.random() < 0.6:
            spoil_json(spoiled / "capture.json", chance)
        else:
            spoil_tensors(chance.choice(sorted(spoiled.rglob("*.safetensors"))), chance)
        refusals += refused(lambda spoiled=spoiled: [Shards.open(spoiled).layer(i) for i in (1, 3)])
    assert refusals >= 6


@pytest.mark.parametrize("positions", [[3, 2], [0, 0], [-1, 2], [5, 63]])
def test_positions_that_no_query_can_have_are_refused(folder, positions):
    path = folder / "text-001" / "layer-01.safetensors"
    held = load_file(path)
    held["positions"][-2:] = torch.tensor(positions, dtype=torch.int32)
    save_file(held, path)
    raises_naming(ValueError, str(path), "positions")(lambda: Shards.open(folder).layer(1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 10**12}, ["tokens", "1000000000000"]),
        ({"tokens": 0}, ["tokens", "0"]),
        ({"decoded": True}, ["decoded", "True"]),
        ({"kind": 3}, ["kind", "3"]),
        ({"seed": 1.5}, ["seed", "1.5"]),
        ({"name": "text-000"}, ["name of its own"]),
    ],
)
def test_numbers_and_names_of_sequences_are_bounded(folder, changes, words):
    sequences = json.loads((folder / "capture.json").read_text())["sequences"]
    describe(folder, sequences=[sequences[0], sequences[1] | changes])
    raises_naming(ValueError, "capture.json", *words)(lambda: Shards.open(folder))


def test_booleans_are_no_layers(folder):
    describe(folder, layers=[True, 3])
    raises_naming(ValueError, "capture.json", "layers", "True")(lambda: Shards.open(folder))
