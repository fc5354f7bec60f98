"""What benchmarks/learned.py asks for: commands that exist, recipes that can be, presets that take their encoders."""

import importlib.util
import re
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


def test_results_that_are_there_are_not_made_again_and_hold_no_paths(learned, tmp_path, monkeypatch):
    asked = []

    def hashattn(arguments):
        asked.append(arguments)
        place = arguments[arguments.index("--json") + 1]
        Path(place).write_text('{"contender": "x:pretrained=%s"}' % (tmp_path / "bias" / "pretrained"))
        return 0

    monkeypatch.setattr(learned, "hashattn", hashattn)
    out = tmp_path / "out.json"
    for _ in range(2):
        learned.judge(out, [], ["x:pretrained={bias}"], {"bias": str(tmp_path / "bias" / "pretrained")}, [])
    assert len(asked) == 1
    assert out.read_text() == '{"contender": "x:pretrained=bias"}'
    monkeypatch.setattr(learned, "hashattn", lambda _: 2)
    with pytest.raises(SystemExit):
        learned.judge(tmp_path / "other.json", [], [], {}, [])
    assert not (tmp_path / "other.json").exists()
