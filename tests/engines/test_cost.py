"""What a CPU's steps cost: as shipped, or as measured on this machine and kept."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch

from hashattn import AsymmetricHash, Consensus, FlatHamming, HashAttention, SimHash, TopK
from hashattn.attend.mixed import CodeResidual
from hashattn.cli import main
from hashattn.engines import cost
from hashattn.engines.base import Request
from hashattn.lab.bench import crossover_cpu

SHAPE = Request(torch.device("cpu"), torch.float32, 1, 8, 2, 64, threads=1)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path))
    cost.costs.cache_clear()
    yield tmp_path
    cost.costs.cache_clear()


def crossover() -> int | None:
    return cost.crossover(HashAttention(SimHash(128), FlatHamming(), TopK(k=64)).parts, SHAPE, compiled=True)


def test_what_was_measured_here_is_followed(own_folder):
    shipped = crossover()
    assert cost.costs() is cost.SHIPPED and cost.source(compiled=True).endswith("crossover_cpu.json")
    slow = dataclasses.replace(cost.SHIPPED, call=10 * cost.SHIPPED.call, source="this machine, today")
    assert cost.keep(slow) == own_folder / "cpu-costs.json"
    assert cost.costs() == slow and cost.source(compiled=True) == "this machine, today"
    assert crossover() > 2 * shipped


@pytest.mark.parametrize("content", ["{", "[]", '{"cpu": 3}', "null"])
def test_a_damaged_file_is_announced_and_left(own_folder, content):
    held = content.replace("3", json.dumps(cost.cpu_name()))
    (own_folder / "cpu-costs.json").write_text(held)
    with pytest.warns(UserWarning, match="crossover --device cpu` measures anew"):
        assert cost.costs() is cost.SHIPPED
    assert (own_folder / "cpu-costs.json").read_text() == held


def test_another_machines_file_is_not_followed(own_folder):
    cost.keep(dataclasses.replace(cost.SHIPPED, call=1.0))
    held = json.loads((own_folder / "cpu-costs.json").read_text())
    (own_folder / "cpu-costs.json").write_text(json.dumps(held | {"cpu": "another"}))
    cost.costs.cache_clear()
    assert cost.costs() is cost.SHIPPED


@pytest.mark.filterwarnings("ignore:.*is not fitted")
def test_what_calibrates_and_what_encodes_costs_its_share():
    """A share of what is measured in docs/cpu.md: MLPs, a second pass, rows of the middle tier."""
    asked = Request(torch.device("cpu"), torch.float32, 1, 9, 3, 64, threads=1)
    linear = HashAttention(AsymmetricHash(128, query_hidden=()), FlatHamming(), TopK(share=0.05))
    plain = linear.replace(encoder=AsymmetricHash(128))
    voting = plain.replace(selector=Consensus(TopK(share=0.05)))
    full = HashAttention.from_preset("dashkv")
    times = [cost.compiled_microseconds(a.parts, asked, 4096, cost.SHIPPED)[1] for a in (linear, plain, voting, full)]
    assert all(10 < after - before < 300 for before, after in pairwise(times)), times
    least = cost.crossover(full.parts, asked, compiled=True, known=cost.SHIPPED)
    full.attend.residual = CodeResidual(128, 32)
    assert 1000 < least < 4096 < cost.crossover(full.parts, asked, compiled=True, known=cost.SHIPPED)


def test_numbers_that_cannot_be_are_refused():
    for wrong in (-1.0, float("nan"), True, "3"):
        with pytest.raises(ValueError, match="word must be a number"):
            dataclasses.replace(cost.SHIPPED, word=wrong)


def test_costs_are_solved_from_times():
    known = dataclasses.replace(cost.SHIPPED, call=100.0, source="")
    keys, few, many, heads, dim = crossover_cpu.KEYS, crossover_cpu.FEW, crossover_cpu.MANY, 8, crossover_cpu.DIM

    def times(itemsize: int, stream: float) -> dict[str, float]:
        def step(n: int, k: int, planes: int) -> float:
            scan = heads * (n - crossover_cpu.SMALL) * (2 * planes * known.word + known.choice)
            return known.call + (scan + heads * (k - few) * 2 * (known.row + known.byte * dim * itemsize)) / 1e3

        dense = 2 * 2 * dim * itemsize * keys / stream
        sizes = {"small": (crossover_cpu.SMALL, few, 1), "few": (keys, few, 1), "many": (keys, many, 1)}
        return {name: step(*size) for name, size in (sizes | {"planes": (keys, few, 2)}).items()} | {"dense": dense}

    us = {"float32": times(4, known.stream), "bfloat16": times(2, known.stream_16)}
    found = crossover_cpu.costs_of(us)
    for field in dataclasses.fields(cost.Costs):
        if field.name != "source":
            assert getattr(found, field.name) == pytest.approx(getattr(known, field.name), rel=1e-3)
    with pytest.raises(RuntimeError, match="measure again"):
        crossover_cpu.costs_of(us | {"float32": us["float32"] | {"planes": 0.0}})


def test_the_command_keeps_what_it_finds(own_folder, monkeypatch, capsys):
    monkeypatch.setattr(crossover_cpu, "KEYS", 1024)
    monkeypatch.setattr(crossover_cpu, "MANY", 512)
    monkeypatch.setattr(crossover_cpu, "LAYERS", 1)
    plain = dataclasses.replace(cost.SHIPPED, source="here")  # so few rounds say little
    monkeypatch.setattr(crossover_cpu, "costs_of", lambda us: dataclasses.replace(plain, call=us["float32"]["small"]))
    assert main(["bench", "crossover", "--device", "cpu", "--rounds", "1", "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "wins from" in told and "cpu-costs.json" in told
    assert cost.costs().call > 1
