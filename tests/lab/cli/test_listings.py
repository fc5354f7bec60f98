"""--version, python -m hashattn, hashattn presets, hashattn explain, and what --help says of every option."""

import argparse
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from hashattn import PRESETS, HashAttention, __version__
from hashattn.cli import main, parser
from hashattn.core.naming import LONGEST, short
from hashattn.presets import names, options_of

ROOT = Path(__file__).parents[3]


def test_version_and_python_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hashattn", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("hashattn", run_name="__main__")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"hashattn {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")
    assert said.count("\n") == 1


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project.get("version", __version__) == __version__
    assert ("version" in project) != ("version" in project.get("dynamic", ()))


def test_all_presets_are_listed_with_what_they_need(capsys):
    assert main(["presets"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["name", *names()]
    assert main(["presets", "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert set(lines) >= set(PRESETS)
    for name in PRESETS:
        assert lines[name]["method"] and lines[name]["package"] == "hashattn" and not lines[name]["fault"]
        assert set(lines[name]["options"]) == set(options_of(name))
        encoder = HashAttention.from_preset(name).encoder
        assert (lines[name]["fitted"] == "") == (encoder is None or not hasattr(encoder, "fit"))
    assert lines["snapkv"]["paper"] == "arXiv 2404.14469"
    assert [lines[name]["fitted"] for name in ("simhash_topk", "dashkv", "pqcache")] == [
        "", "starts random", "must be fitted",
    ]  # fmt: skip
    assert lines["dashkv"]["engines"][:2] == ["reference", "cpu"] and lines["full"]["engines"] == ["dense"]
    assert lines["simhash_topk"]["budget"] and not lines["magicpig"]["budget"]


def test_the_listing_goes_to_a_file(tmp_path, capsys):
    out = tmp_path / "presets.json"
    assert main(["presets", "--json", str(out)]) == 0
    assert capsys.readouterr().out == "" and len(json.loads(out.read_text())) >= len(PRESETS)


def test_presets_of_other_packages_are_listed_and_broken_ones_do_not_hide_the_others(tmp_path, monkeypatch, capsys):
    about = tmp_path / "others-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[hashattn.presets]\ngood = others_of:good\nbad = others_of:missing\n")
    (tmp_path / "others_of.py").write_text(
        "from hashattn import HashAttention\n"
        "def good(*, share: float = 0.1):\n"
        '    """A good one (arXiv 1234.56789)."""\n'
        "    return HashAttention.from_preset('simhash_topk', share=share)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["presets"]) == 0
    good, bad = capsys.readouterr().out.splitlines()[-2:]
    assert good.split()[:3] == ["good", "arXiv", "1234.56789"] and good.endswith("[others]")
    assert bad.startswith("bad ") and "cannot be used: " in bad and bad.endswith("[others]")
    assert main(["explain", "good:share=0.2", "--device", "cpu"]) == 0
    assert "A good one" in capsys.readouterr().out


def test_explain_takes_the_options_of_eval(capsys):
    sizes = {"q_heads": 16, "kv_heads": 4, "head_dim": 64}
    given = [part for name, size in sizes.items() for part in (f"--{name.replace('_', '-')}", str(size))]
    command = ["explain", "simhash_topk:query_bits=4,engine=cpu", *given, "--tokens", "5000", "--batch", "2"]
    assert main([*command, "--dtype", "float32", "--budget", "0.2", "own", "--dense-layers", "0,-1"]) == 0
    said = capsys.readouterr().out
    attn = HashAttention.from_preset("simhash_topk", query_bits=4, engine="cpu", share=0.2)
    for each, budget in (
        (attn, ", 0.2 of the keys: "),
        (attn.replace(selector=HashAttention.from_preset("simhash_topk").selector), ": "),
    ):
        plan = each.explain(**sizes, batch=2, keys=5000, dtype=torch.float32)
        assert f"simhash_topk:query_bits=4,engine=cpu{budget}" in said and str(plan) in said
    assert said.count("layers 0, -1 of a model attend densely instead") == 2


def test_explain_takes_sizes_from_fitted_encoders_and_says_what_is_not_fitted(capsys):
    assert main(["explain", "dashkv_fast", "--encoder", "smollm2-135m-fast", "--keys", "8192"]) == 0
    attn = HashAttention.from_preset("dashkv_fast", pretrained="smollm2-135m-fast")
    assert str(attn.explain(q_heads=9, kv_heads=3, head_dim=64, keys=8192)) in capsys.readouterr().out
    assert main(["explain", "pqcache"]) == 0
    assert "note: this PQ is not fitted" in capsys.readouterr().out


def subcommands(command):
    """By name, those of the subcommands included."""
    found = {}
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                found |= {own.prog: own, **subcommands(own)}
    return found


COMMANDS = subcommands(parser())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_with_its_default(name):
    command = COMMANDS[name]
    shown = re.sub(r"\s+", " ", command.format_help())
    assert "(default: None)" not in shown and "(default: False)" not in shown and "[None]" not in shown
    for action in command._actions:
        assert action.help, action.dest
        if action.nargs == 0 or action.dest == "help":
            continue
        if action.default is None and not action.required:
            # it says what is taken then, goes with a mode, or names something that is optional
            assert re.search(r"left out|default: |write|file|files|option|such as|encoders|preset", action.help), (
                action.dest
            )
        elif not action.required:
            value = action.default if isinstance(action.default, list | tuple) else [action.default]
            assert f"(default: {' '.join(map(str, value))})" in shown, action.dest


def test_a_part_is_named_briefly():
    whole = HashAttention.from_preset("dashkv")
    assert short(whole.index) == repr(whole.index)
    for part in (whole.encoder, whole.selector, whole):
        assert len(short(part)) <= LONGEST + 3 and "\n" not in short(part) and short(part).endswith("...")


def test_errors_of_compositions_begin_with_their_cause():
    whole = HashAttention.from_preset("dashkv")
    for parts in ({"index": None}, {"selector": None}, {"encoder": whole.selector}, {"attend": whole.encoder}):
        with pytest.raises((TypeError, ValueError)) as error:
            whole.replace(**parts)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)
