"""What benchmarks/quality.py asks for: commands that exist, recipes that can be, presets that take their encoders."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from hashattn import HashAttention
from hashattn.cli import parser
from hashattn.lab.learning.fit_command import recipe_of
from hashattn.presets.parsing import parse

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(options):
    """As the command makes it of these arguments."""
    return recipe_of(parser().parse_args(["fit", "shards", "--out", "out", "--steps", "100", *options]))


def test_every_preset_is_there_and_takes_the_recipe_that_it_names(quality):
    taken = set()
    for text in (*quality.ENCODERS, *quality.COMPOSITIONS, *quality.PEERS):
        name, _, rest = text.partition(":")
        named = re.search(r"pretrained={(.*?)}", rest)
        others = ",".join(re.sub(r"pretrained={.*?}", "", rest).format(depth=30).strip(",").split(",,"))
        options = parse(f"{name}:{others}")[1]
        if named is not None:
            fitted = recipe(quality.RECIPES[named[1]]).make(0, 2)
            assert isinstance(fitted, type(HashAttention.from_preset(name, **options).encoder))
            taken.add(named[1])
    assert taken == {*quality.RECIPES}


def test_seeds_are_judged_apart_and_summed_up_once_and_hold_no_paths(quality, tmp_path, monkeypatch):
    asked, folder = [], str(tmp_path / "bias" / "pretrained")
    record = {"part": "tensors", "contender": f"x:pretrained={folder}", "budget": 0.05}

    def together(commands, processes):
        asked.append(commands)
        for command in commands:
            seed, place = (command[command.index(name) + 1] for name in ("--seeds", "--json"))
            values = {"recall": float(seed)}
            result = {"settings": {"seeds": [int(seed)]}, "notes": ["same"], "records": [record | {"values": values}]}
            Path(place).write_text(json.dumps(result))

    monkeypatch.setattr(quality, "together", together)
    out = tmp_path / "out.json"
    for _ in range(2):
        quality.judge(out, [], ["x:pretrained={bias}"], {"bias": folder}, ["--rows", "tensors"], 3, 2)
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


def test_a_command_that_fails_ends_the_script_and_leaves_no_results(quality, tmp_path):
    with pytest.raises(SystemExit):
        quality.together([[sys.executable, "-c", f"raise SystemExit({status})"] for status in (0, 3)], 2)
    with pytest.raises(SystemExit):
        quality.judge(tmp_path / "out.json", ["--model", str(tmp_path / "none")], ["full"], {}, [], 1, 1)
    assert not (tmp_path / "out.json").exists()
