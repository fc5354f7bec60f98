"""The fused decode step under Triton's interpreter, on the CPU, against its reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    AsymmetricHash,
    ExactAttend,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    Recent,
    SimHash,
    Sink,
    Tiers,
)
from hashattn.fused import step
from hashattn.ops.decode import Rule, Scratch, why_not
from tests.ops.decode.cases import CASES, agrees, by_column, inputs
from tests.structured import qkv, seeds

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_on_a_gpu.py", allow_module_level=True)

from hashattn.ops.decode.append import append
from hashattn.ops.decode.encode import encode
from hashattn.ops.decode.triton import decode


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")  # rows that keep no key
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_it_selects_and_attends_as_the_reference_does(shape, rule):
    agrees(decode, inputs(1, **shape), rule)


def test_queries_that_see_everything():
    agrees(decode, inputs(2, tokens=3, filled=90, room=96), Rule(k=20), causal=False)


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(1, 200), st.integers(1, 210), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 9))
def test_any_length_and_budget(seed, filled, k, words, shared, recents):
    start = seed % filled
    x = inputs(seed % 1000, group=2, filled=filled, room=208, words=words, starts=(start,))
    agrees(decode, x, Rule(k=k, shared=shared, recents=recents))


def test_codes_may_have_another_room_than_keys():
    x = inputs(3, filled=300, room=400)
    wide = torch.nn.functional.pad(x.codes, (0, 0, 0, 112))
    a, b = (
        decode(*x.all[:4], codes, *x.all[5:], torch.zeros(4, dtype=torch.int32), Rule(k=9), Scratch(), scale=1.0)
        for codes in (x.codes, wide)
    )
    assert all(torch.equal(s, t) for s, t in zip(a[:3], b[:3], strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
@pytest.mark.parametrize("attend", [MixedPrecision(a=1.3), ExactAttend()], ids=["mixed", "exact"])
def test_tiers_of_a_composition(per, attend):
    q, k, v = qkv(8, 2, tokens=2, keys=400, dim=64)
    selector = Sink(4) | Recent(8) | Tiers(0.1, 0.3, per=per)
    attn = HashAttention(SimHash(100, 2), FlatHamming(), selector, attend, engine="reference")
    cache = attn.new_cache(2, 2, 64)
    cache.append(k + 1, v, start=torch.tensor([0, 70]))
    (exact, expected), (out, found) = attn.run(q, cache, need_lse=True), step(attn, q, cache, 0.125, True)
    if found.tier is None:  # exact attention ignores tiers
        found, expected = (replace(x, tier=torch.zeros_like(x.ids)) for x in (found, expected))
    pairs = zip(*(by_column(x, expected.ids.shape[-1]) for x in (found, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (out.out - exact.out).abs().max() <= 1e-5 * v.abs().max()
    assert (out.lse - exact.lse).abs().max() <= 1e-5 * exact.lse.abs().max()


def test_scratch_is_kept_and_does_not_grow_with_steps():
    x, scratch, bounds = inputs(4, filled=500, room=512), Scratch(), torch.zeros(4, dtype=torch.int32)
    sizes = []
    for _ in range(3):
        decode(*x.all, bounds, Rule(k=9), scratch, scale=1.0)
        sizes.append(scratch.nbytes)
    assert sizes[0] == sizes[1] == sizes[2] > 0
    candidates = scratch.borrow("candidates", (4, 1, 2048), torch.int32, x.q.device)
    assert candidates.data_ptr() == scratch.borrow("candidates", (2,), torch.int32, x.q.device).data_ptr()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "NVIDIA GPU"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 80}, "head_dim 64, 96, 128, 256, not 80"),
        ({"group": 32}, "1 to 16 query heads"),
        ({"tokens": 17}, "up to 16 queries"),
        ({"words": 3}, "64, 128 or 256 bits, not 192"),
        ({"planes": 4}, "query_bits"),
        ({"group": 16, "words": 4, "planes": 2, "rule": Rule(k=3, shared=True)}, "fewer bits"),
    ],
)
def test_what_is_not_served_is_named(change, reason):
    call = {
        "device": "cuda", "dtype": torch.bfloat16, "head_dim": 128, "group": 4, "tokens": 1, "words": 2, "planes": 1,
        "rule": Rule(k=3),
    }  # fmt: skip
    found = why_not(**{**call, **change})
    assert found is None if reason is None else reason in found


@pytest.mark.filterwarnings("ignore:this AsymmetricHash is not fitted:UserWarning")
@pytest.mark.parametrize(
    "encoder",
    [SimHash(64), SimHash(100, query_bits=2), AsymmetricHash(128, query_hidden=(), query_bits=4), SimHash(256)],
    ids=lambda e: f"{e.bits} bits, {e.query_bits} planes",
)
def test_newest_queries_and_keys_are_encoded_and_appended(encoder):
    x = inputs(5, batch=2, kv_heads=2, group=3, tokens=2, filled=40, room=64, words=-(-encoder.bits // 64), dim=96)
    k, v, centre = torch.randn(2, 2, 2, 96), torch.randn(2, 2, 2, 96), torch.randn(2, 2, 96)
    planes = encoder.linear_planes(96, torch.device("cpu"))
    held = x.keys.clone(), x.values.clone(), x.codes.clone(), x.length.clone()
    query = encode(x.q, k, v, centre, planes, encoder.query_bits, *held)
    exact = encoder.encode_query(x.q)
    # a value within rounding of zero, or of a step, may fall to either side
    assert (query != (exact if exact.ndim == 5 else exact.unsqueeze(3))).float().mean() < 0.05
    assert int(held[3]) == 42
    for stored, before, new in zip(held, x.all[2:5], (k, v, encoder.encode_key(k, centre)), strict=False):
        same = stored[:, :, 40:42] == new
        assert same.all() if new.is_floating_point() else same.float().mean() > 0.9
        rest = torch.cat([stored[:, :, :40], stored[:, :, 42:]], 2)
        assert torch.equal(rest.nan_to_num(), torch.cat([before[:, :, :40], before[:, :, 42:]], 2).nan_to_num())


def test_what_does_not_fit_is_dropped_and_counted():
    x = inputs(6, batch=2, kv_heads=2, filled=63, room=64)
    k = torch.ones(2, 2, 3, 64)
    for write in (
        lambda *held: append(k, k, torch.zeros(2, 2, 3, 1, dtype=torch.int64), *held),
        lambda *held: encode(
            x.q.expand(-1, -1, 3, -1), k, k, torch.zeros(2, 2, 64), SimHash(64).linear_planes(64, k.device), 1, *held
        ),
    ):
        held = x.keys.clone(), x.values.clone(), x.codes.clone(), x.length.clone()
        write(*held)
        assert int(held[3]) == 66
        assert (held[0][:, :, 63] == 1).all() and (held[1][:, :, 63] == 1).all()
        assert torch.equal(held[0][:, :, :63], x.keys[:, :, :63]) and torch.equal(
            held[2][:, :, :63], x.codes[:, :, :63]
        )


def test_an_outgrown_length_gives_nan_and_reads_nothing_beyond_the_room():
    x = inputs(7, filled=64, room=64)
    x.length.fill_(70)
    out, lse, ids, _ = decode(*x.all, torch.zeros(4, dtype=torch.int32), Rule(k=64), Scratch(), scale=1.0)
    assert out.isnan().all() and torch.isfinite(lse).all()
    assert sorted(ids[0, 0, 0].tolist()) == list(range(64))
