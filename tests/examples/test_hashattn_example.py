"""The example package, found by its entry point as an installed one is: nothing is installed."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from hashattn import FaissBinary, HashAttention
from hashattn.cli import main
from hashattn.presets import PRESETS, preset
from hashattn.testing import check_encoder, check_index, check_preset
from hashattn.testing.inputs import Shape
from tests.structured import raises_naming

EXAMPLE = Path(__file__).parents[2] / "examples" / "hashattn_example"
MODULE = "hashattn_example"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The module, on sys.path beside what an installer would write of pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = tmp_path / f"{MODULE}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE)


def test_it_takes_less_than_40_lines():
    assert len((EXAMPLE / f"{MODULE}.py").read_text(encoding="utf-8").splitlines()) < 40


def test_its_preset_is_one_like_the_others(example, capsys):
    assert preset("sign_topk") is example.sign_topk
    assert "sign_topk" not in PRESETS
    attn = HashAttention.from_preset("sign_topk", bits=32, share=0.2)
    assert attn.encoder == example.Signs(32)
    assert attn.replace(index=FaissBinary()).selector.budget(1000) == 200
    assert main(["explain", "sign_topk", "--head-dim", "64"]) == 0
    assert "Signs of the channels themselves" in capsys.readouterr().out


def test_its_parts_keep_the_contract(example):
    check_encoder(example.Signs(32))
    check_encoder(example.Signs(32, query_bits=4))
    check_index(FaissBinary(), example.Signs(32))
    built = check_preset(example.sign_topk, bits=64, shape=Shape(head_dim=64))
    assert built == HashAttention.from_preset("sign_topk")


def test_mistakes_are_told(example):
    raises_naming(ValueError, "'sign_top'", "did you mean 'sign_topk'?")(lambda: HashAttention.from_preset("sign_top"))
    raises_naming(ValueError, "head_dim = 32", "64")(lambda: check_encoder(example.Signs(64)))
    assert eval(repr(example.Signs(32)), vars(example)) == example.Signs(32)


def test_without_the_package_its_preset_is_unknown():
    raises_naming(ValueError, "unknown preset 'sign_topk'")(lambda: HashAttention.from_preset("sign_topk"))
