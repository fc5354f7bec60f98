"""The fused decode step under Triton's interpreter, on the CPU, against its reference."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops.decode import KernelRequest, Rule, Scratch, why_not
from hashattn.ops.decode.sizes import Sizes, carve
from tests.ops.decode.cases import CASES, LOCAL_CASES, TIER_CASES, WORST, agrees, inputs, ready, same, stored
from tests.structured import seeds

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_on_a_gpu.py", allow_module_level=True)

from hashattn.ops.decode.triton.decode import decode


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")  # rows that keep no key
@pytest.mark.parametrize(("shape", "rule"), CASES + LOCAL_CASES)
def test_it_selects_and_attends_as_the_reference_does(shape, rule):
    hints = (None, None) if rule.chunks is not None else (None, WORST)  # chunks are searched without
    agrees(decode, inputs(1, **shape), rule, hints=hints)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")  # rows that keep no key
@pytest.mark.parametrize(("shape", "rule"), TIER_CASES)
def test_medium_keys_are_estimated_as_the_reference_does_and_not_read(shape, rule):
    agrees(decode, inputs(1, **shape), rule)


@pytest.mark.parametrize("rule", [Rule(k=20), Rule(k=32, chunks=2)], ids=str)
def test_queries_that_see_everything(rule):
    agrees(decode, inputs(2, tokens=3, filled=90, room=96), rule, causal=False)


@settings(max_examples=5, deadline=None)
@given(seeds, st.integers(1, 200), st.integers(1, 210), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 9))
def test_any_length_and_budget(seed, filled, k, words, shared, recents):
    start = seed % filled
    x = inputs(seed % 1000, group=2, filled=filled, room=208, words=words, starts=(start,))
    agrees(decode, x, Rule(k=k, shared=shared, recents=recents))


@settings(max_examples=4, deadline=None)
@given(
    seeds, st.integers(1, 200), st.integers(1, 9), st.sampled_from([1, 2]), st.sampled_from([(0, 0), (3, 0), (2, 9)])
)
def test_any_length_and_number_of_chunks(seed, filled, chunks, words, forced):
    x = inputs(seed % 1000, group=2, filled=filled, room=208, words=words, starts=(seed % filled,))
    rule = Rule(k=16 * chunks, chunks=chunks, sinks=forced[0], recents=forced[1] if chunks > 1 else 0)
    agrees(decode, x, rule)


def test_more_columns_than_chunks_serve_are_refused():
    x = inputs(8, filled=9, room=16)
    codes = torch.zeros(1, 1, 1, 1, dtype=torch.int64).expand(-1, -1, 600_000, -1)
    with pytest.raises(ValueError, match="600,000 columns, 2 chunks serve up to 524,288"):
        decode(replace(stored(x, codes=codes), rule=Rule(k=16, chunks=2)))


def test_codes_may_have_another_room_than_keys():
    x = inputs(3, filled=300, room=400)
    wide = stored(x, codes=torch.nn.functional.pad(x.stored.codes, (0, 0, 0, 112)))
    assert same(decode(ready(x, Rule(k=9))), decode(ready(wide, Rule(k=9))))


def test_a_workspace_is_shared_kept_and_no_larger_than_needed():
    small = Sizes(1, 32, 8, 1, 128, 1 << 17, 1 << 17, 1, 1, Rule(k=1024))
    assert small.workspace <= 24e6
    scratch, device = Scratch(), torch.device("cpu")
    first = scratch.workspace(300, device)
    assert scratch.workspace(200, device) is first
    assert first is not scratch.workspace(400, device) and scratch.nbytes == 400  # who holds the first one keeps it
    small_one = weakref.ref(first)
    del first
    assert small_one() is None
    buffers = [scratch.borrow("parts", (n,), torch.float32, device) for n in (3, 9, 2)]
    assert scratch.nbytes == 436 and buffers[1].data_ptr() == buffers[2].data_ptr() and len(buffers[2]) == 2
    buffers = carve(torch.empty(small.workspace, dtype=torch.uint8), small.triton)
    ends = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in buffers.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": torch.device("cpu")}, "NVIDIA GPU"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 80}, "head_dim 64, 96, 128, 256, not 80"),
        ({"q_heads": 256}, "1 to 16 query heads"),
        ({"tokens": 17}, "up to 16 queries"),
        ({"words": 3}, "64, 128 or 256 bits, not 192"),
        ({"planes": 4}, "query_bits"),
        ({"rule": Rule(k=64, chunks=4, recents=40)}, None),
        ({"rule": Rule(k=64, chunks=4, shared=True)}, "per query head"),
        ({"rule": Rule(k=40, chunks=4)}, "per_chunk 8, 16, 32, 64, not 10"),
        ({"rule": Rule(k=32, chunks=4, sinks=4, recents=8)}, "up to 12 sinks and recents"),
        ({"q_heads": 128, "words": 4, "planes": 2, "rule": Rule(k=3, shared=True)}, "fewer bits"),
        ({"q_heads": 64, "rule": Rule(k=3, shared=True, biased=True)}, None),
        ({"q_heads": 128, "rule": Rule(k=3, shared=True, biased=True)}, "6,128"),
    ],
)
def test_what_is_not_served_is_named(change, reason):
    request = KernelRequest(torch.device("cuda"), torch.bfloat16, 32, 8, 128, 2, 1, Rule(k=3))
    found = why_not(replace(request, **change))
    if reason is None:
        assert found == []
    else:
        assert len(found) == 1 and reason in found[0]


def test_every_reason_is_named_at_once():
    found = why_not(
        KernelRequest(torch.device("cuda"), torch.float64, 32, 8, 80, 3, 1, Rule(k=40, chunks=4, shared=True))
    )
    wanted = "float64", "head_dim", "192", "per query head", "per_chunk"
    assert len(found) == len(wanted) and all(word in reason for word, reason in zip(wanted, found, strict=True))


@pytest.mark.parametrize("rule", [Rule(k=64), Rule(k=64, chunks=1)], ids=str)
def test_a_length_beyond_the_room_gives_nan_and_reads_nothing_beyond_the_room(rule):
    x = inputs(7, filled=64, room=64)
    x.stored.length.fill_(70)
    out, lse, ids = decode(ready(x, rule))[:3]
    assert out.isnan().all() and torch.isfinite(lse).all()
    assert sorted(ids[0, 0, 0].tolist()) == list(range(64))
