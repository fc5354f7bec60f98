"""Queries that drift: the k-th nearest distance wanders as was measured, and hints that fall short are counted."""

import pytest
import torch

from hashattn.lab.bench import cuda_drift
from hashattn.lab.bench.cases import Case
from hashattn.lab.bench.cuda_contenders import row_distances
from hashattn.lab.bench.cuda_drift import LASTING, SETTLING, SPREAD, drifting, missed, thresholds
from hashattn.lab.bench.cuda_steps import rule, selectors
from hashattn.ops.decode import reference

CASE, CPU = Case(4, 2, 16, "float32", 3000, 60, batch=2), torch.device("cpu")
PER = ("query_head", "kv_head")


def kth(layer, queries, per, k=CASE.k):
    """[steps, rows]: the k-th nearest distance of each choice."""
    found = []
    for query in queries:
        layer.query[0].copy_(query)
        found.append(row_distances(layer, per == "kv_head").kthvalue(k, -1).values)
    return torch.stack(found)


@pytest.mark.parametrize("bits", [64, 128])
def test_the_threshold_wanders_as_was_measured(bits):
    layer, queries = drifting(CASE, bits, 300, CPU)
    assert queries.shape == (300, 2, 4, 1, 1, bits // 64) and layer.query[0].is_contiguous()
    found = kth(layer, queries, "query_head").double()
    x = found - found.mean(0)
    assert x.std().item() == pytest.approx(SPREAD * bits / 64, rel=0.25)
    assert ((x[1:] * x[:-1]).sum() / (x * x).sum()).item() == pytest.approx(LASTING, abs=0.1)


@pytest.mark.parametrize("per", PER)
def test_a_threshold_is_the_largest_distance_that_was_kept(per):
    layer, queries = drifting(CASE, 64, 3, CPU)
    asked = rule(CASE, selectors(CASE, per)["TopK"])
    for query in queries:
        layer.query[0].copy_(query)
        ids = reference(layer.inputs(0, asked))[2]
        assert torch.equal(thresholds(layer, ids), kth(layer, [query], per)[0])
        ids[..., -3:] = -1  # empty slots
        assert (thresholds(layer, ids) <= kth(layer, [query], per)[0]).all()


@pytest.mark.parametrize("per", PER)
def test_hints_that_fall_short_are_counted_after_the_first_steps(per):
    steps = SETTLING + 20
    layer, queries = drifting(CASE, 64, steps, CPU)
    asked = rule(CASE, selectors(CASE, per)["TopK"])
    wanted = kth(layer, queries, per)
    bounds = torch.zeros(3, wanted.shape[1], dtype=torch.int32)

    def step(margin):
        kept = reference(layer.inputs(0, asked))[:3]
        bounds[0] = (thresholds(layer, kept[2]) + margin) * 16 + 15  # fractions of a distance count for nothing
        return kept

    for margin, short in ((0, wanted[1:] > wanted[:-1]), (2, wanted[1:] > wanted[:-1] + 2)):
        bounds.zero_()
        assert missed(lambda m=margin: step(m), layer, queries, bounds) == int(short[SETTLING - 1 :].sum())
    assert missed(lambda: step(1000), layer, queries, bounds) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("per", PER)
def test_drifting_steps_are_measured(monkeypatch, per):
    from hashattn.ops.decode import Scratch

    monkeypatch.setattr(cuda_drift, "STEPS", 50)
    case = Case(8, 2, 64, "bfloat16", 20_000, 200, batch=2)
    found = cuda_drift.measure(case, rule(case, selectors(case, per)["TopK"]), 64, Scratch())
    assert found["steps"] == 50 and found["missed_per_1000"] >= 0
    assert 0 < found["p50_us"] <= found["p99_us"] <= found["max_us"]
