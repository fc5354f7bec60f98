"""The compiled step keeps the reference's keys and attends to them, over odd shapes, ties, windows and threads."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops.compiled import loops, why_not, why_not_here
from hashattn.ops.compiled.step import Step, compile_for
from hashattn.ops.decode import Inputs, KernelRequest, Outputs, Rule, reference
from tests.ops.decode.cases import (
    BEYOND,
    CASES,
    TIER_CASES,
    in_float64,
    inputs,
    norms_of,
    only_read,
    poisoned,
)
from tests.structured import generator, seeds


def run(x: Inputs, step: Step | None = None) -> Outputs:
    """The step over what is stored, all of which has codes."""
    bits = 64 * x.stored.codes.shape[3] if x.estimate is None else x.estimate.bits
    centre = torch.zeros(*x.stored.keys.shape[:2], x.q.shape[3]) if x.estimate is None else x.estimate.centre
    length = int(x.stored.length)
    longest = max(0, length - int(x.starts.min()))
    with poisoned():
        return (step or Step(x, bits, (None, None), centre))(
            x.q.contiguous(), x.query.contiguous(), (longest, length, length), x.scale
        )


def ascending(found: Outputs, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns in ascending order, empty slots first, in so many slots; and their tiers."""
    ids, order = found.ids.sort(-1)
    tier = torch.zeros_like(ids) if found.tier is None else found.tier.gather(-1, order).to(ids.dtype)
    pad = (max(0, slots - ids.shape[-1]), 0)
    return (torch.nn.functional.pad(t, pad, value=v)[..., -slots:] for t, v in ((ids, -1), (tier, 0)))


def agrees(x: Inputs, rule: Rule) -> None:
    """Twice: a step leaves for the next one where its distances began."""
    estimate = norms_of(x, 64 * x.stored.codes.shape[3] - 3) if rule.critical is not None else None
    x = replace(x, rule=rule, estimate=estimate)
    expected = reference(x)
    readable = x if estimate is None else only_read(x, *expected[2:4])
    step = Step(
        readable,
        64 * x.stored.codes.shape[3] if estimate is None else estimate.bits,
        (None, None),
        torch.zeros(*x.stored.keys.shape[:2], x.q.shape[3]) if estimate is None else estimate.centre,
    )
    exact = reference(in_float64(x))
    spacing, size = torch.finfo(x.q.dtype).eps, x.stored.values[:, :, : int(x.stored.length)].double().abs().max()
    keys = x.stored.keys[:, :, : int(x.stored.length)].double()
    logit = (x.q.double().norm(dim=-1).max() * keys.norm(dim=-1).max()) * x.scale
    slots = expected.ids.shape[-1]
    for _ in range(2):
        found = run(readable, step)
        for own, wanted in zip(ascending(found, slots), ascending(expected, slots), strict=True):
            assert torch.equal(own, wanted), rule
        # p and the output are rounded to the values' dtype; sums are float32 over at most 20,000 keys
        assert (found.out.double() - exact.out).abs().max() <= 3 * spacing * size + 1e-5 * size, rule
        seen = torch.isfinite(exact.lse)
        assert torch.equal(torch.isfinite(found.lse), seen)
        assert ((found.lse - exact.lse)[seen].abs() <= 1e-6 * logit + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_keeps_what_the_reference_keeps(case, dtype):
    sizes, rule = CASES[case]
    agrees(inputs(case, dtype=dtype, **sizes), rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", range(len(TIER_CASES)))
def test_tiers_are_the_references_and_medium_keys_are_not_read(case, dtype):
    sizes, rule = TIER_CASES[case]
    agrees(inputs(case, dtype=dtype, **sizes), rule)


@pytest.mark.parametrize("rule", BEYOND, ids=str)
def test_numbers_beyond_32_bits_mean_everything(rule):
    agrees(inputs(4, filled=200, room=208), rule)


@pytest.mark.parametrize("words", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("planes", [1, 2, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_codes_of_any_length_and_queries_of_several_planes(words, planes, shared):
    x = inputs(words, words=words, planes=planes, kv_heads=2, group=3, dim=24, filled=333, room=340)
    agrees(x, Rule(share=0.2, shared=shared, sinks=1, recents=3))


@pytest.mark.parametrize("shared", [False, True])
def test_from_many_keys_a_sample_says_about_where_the_nearest_end(shared):
    x = inputs(3, words=2, group=2, dim=8, filled=20_000, room=20_000)
    for rule in (Rule(k=1), Rule(share=0.05, sinks=4), Rule(k=19_990), Rule(share=0.3, radius=60)):
        agrees(x, replace(rule, shared=shared))


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds, keys=st.integers(1, 300), k=st.integers(1, 320), kinds=st.integers(1, 6), radius=st.integers(-1, 70),
    forced=st.tuples(st.integers(0, 40), st.integers(0, 40)), start=st.integers(0, 320), shared=st.booleans(),
    sorted_=st.booleans(),
)  # fmt: skip
def test_ties_go_to_the_most_recent_key(seed, keys, k, kinds, radius, forced, start, shared, sorted_):
    x = inputs(seed, filled=keys, room=keys, group=2, dim=8)
    few = x.stored.codes[:, :, torch.randint(0, keys, (keys,), generator=generator(seed)) % kinds % keys]
    few = few.sort(2).values if sorted_ else few
    x = replace(x, stored=replace(x.stored, codes=few), starts=torch.tensor([min(start, keys)], dtype=torch.int32))
    rule = Rule(k=k, shared=shared, sinks=forced[0], recents=forced[1], radius=None if radius < 0 else radius)
    agrees(x, rule)


def test_what_is_broken_stays_broken():
    x = inputs(1, filled=100, room=100, group=2)
    x = replace(x, rule=Rule(k=100))
    for what, value in (("keys", torch.nan), ("values", torch.nan), ("keys", torch.inf), ("values", -torch.inf)):
        broken = getattr(x.stored, what).clone()
        broken[:, :, 50, 3] = value
        y = replace(x, stored=replace(x.stored, **{what: broken}))
        found, expected = run(y), reference(y)
        assert torch.equal(found.out.isfinite(), expected.out.isfinite()), (what, value)
    lost = replace(x, q=x.q * torch.inf)
    assert run(lost).out.isnan().all()


def test_a_row_that_sees_nothing_is_zero():
    x = replace(inputs(1, filled=60, room=64, starts=(60,)), rule=Rule(k=5, sinks=2, recents=2))
    found = run(x)
    assert (found.out == 0).all() and (found.ids == -1).all() and (found.lse == -torch.inf).all()


def test_bfloat16_is_rounded_to_the_nearest_even():
    x = replace(inputs(2, filled=1, room=8, dim=64, dtype=torch.bfloat16), rule=Rule(k=1))
    exact = torch.randn(4, 1, 64, generator=generator(0))
    y = replace(x, stored=replace(x.stored, values=exact[:1, None, 0].bfloat16().expand(1, 1, 8, 64).contiguous()))
    assert torch.equal(run(y).out[0, 0, 0], y.stored.values[0, 0, 0])  # one key's weight is 1
    halves = replace(x, rule=Rule(k=8), stored=replace(x.stored, length=torch.tensor([2], dtype=torch.int32)))
    keys = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
    values = torch.randn(1, 1, 8, 64, generator=generator(1)).bfloat16()
    halves = replace(halves, stored=replace(halves.stored, keys=keys, values=values))
    mean = (values[0, 0, 0].float() + values[0, 0, 1].float()) / 2  # exact in float32
    assert torch.equal(run(halves).out[0, 0, 0], mean.bfloat16())


def test_threads_that_share_nothing_and_threads_within_a_step_give_what_one_gives(monkeypatch):
    monkeypatch.setattr("hashattn.ops.compiled.threads._WORTH", 1.0)
    xs = [replace(inputs(i, batch=2, kv_heads=3, filled=900 + i, room=1000), rule=Rule(k=50 + i)) for i in range(3)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [run(x) for x in xs]
        torch.set_num_threads(3)
        found: dict[int, list[Outputs]] = {}

        def decode(i: int) -> None:
            step = Step(xs[i], 64, (None, None), torch.zeros(2, 3, 64))
            length = int(xs[i].stored.length)
            found[i] = [step(xs[i].q, xs[i].query, (length, length, length), xs[i].scale) for _ in range(20)]

        workers = [threading.Thread(target=decode, args=(i,)) for i in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    for i, expected in enumerate(alone):
        for one in found[i]:
            assert torch.equal(one.ids, expected.ids) and torch.equal(one.out, expected.out)


def test_what_it_does_not_serve_is_named():
    assert why_not_here() == ()
    asked = KernelRequest(torch.device("cpu"), torch.float16, 4, 2, 64, 2, 1, Rule(k=8, chunks=2), "other")
    assert why_not(asked) == [
        "they serve binary codes in a FlatHamming index",
        "they serve float32 and bfloat16, not float16",
        "they choose of all keys, not of each chunk as LocalTopK does",
    ]
    far = replace(asked, dtype=torch.float32, scores="hamming", rule=Rule(k=8), words=16, planes=8)
    assert why_not(far) == ["they tell distances up to 60,000 apart, not 261,120: take fewer bits or query_bits"]
    assert why_not(replace(asked, device=torch.device("cuda"))) == ["its loops need tensors on the CPU, got cuda"]


def test_compiling_ahead_leaves_nothing_to_compile():
    for dtype in (torch.float32, torch.bfloat16):
        compile_for(dtype)
        known = len(loops.step.signatures)
        run(replace(inputs(5, dtype=dtype), rule=Rule(k=3, shared=True)))
        assert len(loops.step.signatures) == known
