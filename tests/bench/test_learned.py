"""What benchmarks/learned.py asks for: commands that exist, recipes that can be, presets that take their encoders."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from hashattn import HashAttention
from hashattn.cli import parser
from hashattn.evaluation.contenders import learns

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "learned.py"


@pytest.fixture(scope="module")
def learned():
    spec = importlib.util.spec_from_file_location("learned", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_one_that_fit_takes(learned):
    for options in learned.RECIPES.values():
        arguments = parser().parse_args(["fit", "shards", "--out", "out", "--steps", "100", *options])
        assert arguments.command == "fit"


def test_every_preset_is_there_and_takes_the_recipe_that_it_names(learned):
    for text in (*learned.ENCODERS, *learned.COMPOSITIONS):
        name, _, rest = text.partition(":")
        attn = HashAttention.from_preset(name)
        recipe = re.search(r"{(.*)}", rest)
        if recipe is None:
            continue
        assert learns(name)
        symmetric = "symmetric" in learned.RECIPES[recipe[1]]
        assert (type(attn.encoder).__name__ == "SymmetricHash") == symmetric


def test_seeds_are_judged_apart_and_summed_up_once_and_hold_no_paths(learned, tmp_path, monkeypatch):
    asked, folder = [], str(tmp_path / "bias" / "pretrained")
    record = {"part": "tensors", "contender": f"x:pretrained={folder}", "budget": 0.05}

    def together(commands, processes):
        asked.append(commands)
        for command in commands:
            seed, place = (command[command.index(name) + 1] for name in ("--seeds", "--json"))
            values = {"recall": float(seed)}
            result = {"settings": {"seeds": [int(seed)]}, "notes": ["same"], "records": [record | {"values": values}]}
            Path(place).write_text(json.dumps(result))

    monkeypatch.setattr(learned, "together", together)
    out = tmp_path / "out.json"
    for _ in range(2):
        learned.judge(out, [], ["x:pretrained={bias}"], {"bias": folder}, ["--rows", "tensors"], 3, 2)
    assert len(asked) == 1
    assert len(asked[0]) == 3
    found = json.loads(out.read_text())
    assert found["settings"]["seeds"] == [0, 1, 2]
    assert found["notes"] == ["same"]
    assert "records" not in found
    (row,) = found["rows"]
    assert (row["contender"], row["figures"]["recall"]["mean"], row["figures"]["recall"]["n"]) == (
        "x:pretrained=bias", 1.0, 3,
    )  # fmt: skip


def test_a_command_that_fails_ends_the_script_and_leaves_no_results(learned, tmp_path):
    with pytest.raises(SystemExit):
        learned.together([[sys.executable, "-c", f"raise SystemExit({status})"] for status in (0, 3)], 2)
    with pytest.raises(SystemExit):
        learned.judge(tmp_path / "out.json", ["--model", str(tmp_path / "none")], ["full"], {}, [], 1, 1)
    assert not (tmp_path / "out.json").exists()
