"""Steps of every family of scores under Triton's interpreter, on the CPU, against their specifications."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops.decode import KernelRequest, Rule, why_not
from hashattn.ops.decode.families import FAMILIES
from tests.ops.decode.families import CASES, FORCED, NAMES, agrees, inputs
from tests.structured import generator, seeds

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_families_on_a_gpu.py", allow_module_level=True)

import triton
import triton.language as tl

from hashattn.ops.decode.sizes import carve
from hashattn.ops.select.plan import BINS, Plan
from hashattn.ops.select.prepare import prepare
from hashattn.ops.select.triton import bin_of, within_bin

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


@triton.jit
def into_bins(ranks, out, low, bits, centre, shift, BINS: tl.constexpr, N: tl.constexpr):
    at, bins = tl.arange(0, N), tl.arange(0, BINS)
    centre, shift = tl.load(centre), tl.load(shift)
    tl.store(out + at, bin_of(tl.load(ranks + at), centre, shift, BINS))
    first, wide = within_bin(bins, centre, shift, BINS)
    tl.store(low + bins, first)
    tl.store(bits + bins, wide)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(-(2**31), 2**31 - 1), st.integers(0, 22))
def test_bins_are_in_the_order_of_ranks_and_hold_what_they_say(seed, centre, shift):
    g = generator(seed)
    near = centre + (torch.randn(192, generator=g).double() * 2.0 ** (3 * torch.randn(192, generator=g) + shift)).long()
    ranks = torch.cat([near, torch.randint(-(2**31), 2**31, (64,), generator=g)]).clamp(-(2**31), 2**31 - 1).sort()[0]
    out, bits = torch.full((256,), -1, dtype=torch.int32), torch.full((BINS,), -1, dtype=torch.int32)
    low, held = torch.empty(BINS, dtype=torch.int64), [torch.tensor([x], dtype=torch.int32) for x in (centre, shift)]
    into_bins[(1,)](ranks.int(), out, low, bits, *held, BINS, 256)
    assert (out.diff() >= 0).all() and out[0] >= 0 and out[-1] < BINS
    inside = ranks - low[out.long()]
    assert (inside >= 0).all() and (inside >> bits[out.long()] == 0).all()


@pytest.mark.parametrize("name", ["pq", "dot"])
def test_few_more_keys_are_looked_at_than_wanted_when_queries_alternate(name):
    x, other = (inputs(name, Rule(k=64), seed, filled=4000, room=4096, group=2) for seed in (0, 1))
    run, plan = step(x), Plan.of(x)
    for _ in range(4):
        for query in (x.query, other.query * 2):
            run(x.q, query, x.scale, None)
            upto = carve(x.workspace, plan.buffers)["counts"].int().sum(2)  # [rows, BINS]
            listed = upto.where(upto >= 64, upto.max()).amin(1)
    assert (listed < 3 * 64).all()


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
