"""Steps of every family of scores under Triton's interpreter, on the CPU, against their specifications."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops.decode import KernelRequest, Rule, why_not
from hashattn.ops.decode.families import FAMILIES
from tests.ops.decode.families import CASES, FORCED, NAMES, agrees, inputs
from tests.structured import seeds

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_families_on_a_gpu.py", allow_module_level=True)

from hashattn.ops.select.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")  # no key is kept


def step(x):
    return prepare(x, FAMILIES[x.scores].in_triton(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_it_chooses_and_attends_as_its_specification_does(name, shape, rule):
    x = inputs(name, rule, **shape)
    agrees(step(x), x)


@pytest.mark.parametrize(("shape", "rule"), FORCED)
def test_keys_are_kept_for_their_position_without_scores(shape, rule):
    x = inputs("positions", rule, **shape)
    agrees(step(x), x, hints=(None,))


@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from(NAMES), st.integers(1, 200), st.integers(1, 210), st.booleans(), st.integers(0, 9))
def test_any_length_and_budget(seed, name, filled, k, shared, recents):
    rule = Rule(k=k, shared=shared, recents=recents)
    x = inputs(name, rule, seed % 1000, group=2, filled=filled, room=208, starts=(seed % filled,))
    agrees(step(x), x, hints=(None, None))


def test_queries_that_see_everything():
    x = inputs("dot", Rule(k=20), tokens=3, filled=90, room=96, causal=False)
    agrees(step(x), x, hints=(None,))


@pytest.mark.parametrize("name", ["dot", "rabitq"])
def test_keys_that_are_not_finite_are_the_farthest_and_hide_no_others(name):
    x = inputs(name, Rule(k=30), filled=200, room=208)
    if name == "dot":
        x.stored.codes[:, :, 5:20], x.stored.codes[:, :, 30, 0] = torch.nan, torch.inf
    else:
        x.stored.codes.view(torch.float32)[:, :, 5:20, -2] = torch.nan
    found = agrees(step(x), x)
    assert not ((found.ids >= 5) & (found.ids < 20)).any()


def test_beyond_the_room_the_output_is_nan_and_nothing_is_read():
    x = inputs("pq", Rule(k=20), filled=90, room=96)
    run = step(x)
    x.stored.length.fill_(97)
    assert run(x.q, x.query, x.scale, None).out.isnan().all()


def test_what_is_not_served_is_refused():
    gpu, dtype = torch.device("cuda"), torch.bfloat16
    asked = KernelRequest(gpu, dtype, 32, 8, 128, 256, 16, Rule(k=9), "pq")
    assert why_not(asked) == []
    other = KernelRequest(gpu, torch.float64, 32, 1, 100, 256, 80, Rule(k=16, chunks=2), "pq", tokens=17)
    reasons = "; ".join(why_not(other))
    for word in ("float64", "head_dim", "32", "17", "TopK and Threshold", "64 bytes"):
        assert word in reasons
