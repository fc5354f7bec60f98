import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    Centring,
    CollisionSample,
    ExactAttend,
    FlatDot,
    FlatHamming,
    HashAttention,
    Identity,
    Momentum,
    Recent,
    SampledAttend,
    SimHash,
    Sink,
)
from hashattn.core.collisions import Collisions
from hashattn.core.types import CRITICAL, SAMPLED
from hashattn.ops.hamming import unpack_bits
from hashattn.selectors.collision_sample import collisions
from tests.structured import generator, heads, odd_lengths, qkv, raises_naming, seeds, selected, visible_mask


def composed(tables, bits, forced=False, seed=0, **options):
    sample = CollisionSample(tables, bits)
    selector = Sink(1) | Recent(2) | sample if forced else sample
    encoder = SimHash(sample.code_bits, centring=None, seed=seed, orthogonal=False)
    return HashAttention(encoder, FlatHamming(), selector, SampledAttend(**options), engine="reference")


def brute_collisions(query, codes, tables, bits):
    each = 64 * -(-tables // 64)
    q, k = unpack_bits(query, each * bits).numpy(), unpack_bits(codes, each * bits).numpy()
    k = np.repeat(k, q.shape[1] // k.shape[1], 1)
    agree = (q[:, :, :, None] == k[:, :, None]).reshape(*q.shape[:3], k.shape[2], bits, each)
    return agree.all(-2)[..., :tables].sum(-1)


@settings(deadline=None, max_examples=10)
@given(
    seed=seeds, shape=heads, keys=odd_lengths, tables=st.sampled_from([2, 63, 64, 65, 150]), bits=st.integers(1, 5),
    forced=st.booleans(), engine=st.sampled_from(["reference", "cpu"]),
)  # fmt: skip
def test_keys_that_share_two_tables_are_found(seed, shape, keys, tables, bits, forced, engine):
    q, k, v = qkv(seed, 2, *shape, min(2, keys), keys)
    attn = composed(tables, bits, forced).replace(engine=engine)
    start = torch.tensor([0, keys // 2])
    cache = attn.new_cache(2, shape[0], 16)
    cache.append(k, v, start=start)
    query = attn.encoder.encode_query(q)
    found = torch.from_numpy(brute_collisions(query, cache.codes, tables, bits))
    assert torch.equal(collisions(query, cache.codes, tables, bits).long(), found)
    _, selection = attn.run(q, cache)
    seen = visible_mask(q.shape[2], keys, start.tolist())
    must = torch.zeros_like(seen)
    if forced:
        age = seen.flip(-1).cumsum(-1).flip(-1)  # 1 for the last visible key
        must = seen & ((seen.cumsum(-1) <= 1) | (age <= 2))
    last = seen & (seen.flip(-1).cumsum(-1).flip(-1) == 1)
    must = must | last & ~((found >= 2) & seen | must).any(-1, keepdim=True)  # who finds nothing keeps the last key
    assert torch.equal(selected(selection.ids, keys, q.shape[1]), (found >= 2) & seen | must)
    columns = selection.ids.clamp(min=0).long()
    is_forced = must.expand(found.shape).gather(-1, columns) & (selection.ids >= 0)
    assert torch.equal(selection.tier == CRITICAL, is_forced)
    assert torch.equal(selection.tier == SAMPLED, ~is_forced)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 300), st.integers(1, 12), st.floats(-1, 1))
def test_the_probability_is_the_closed_form(tables, bits, cosine):
    a = (1 - math.acos(cosine) / math.pi) ** bits
    exact = math.fsum(math.comb(tables, j) * a**j * (1 - a) ** (tables - j) for j in range(2, tables + 1))
    found = Collisions(tables, bits).probability(torch.tensor(cosine, dtype=torch.float64)).item()
    # float64 loses what L p^K is smaller than 1: about eps / (L p^K) of the result
    assert math.isclose(found, exact, rel_tol=1e-9, abs_tol=1e-18 + 1e-12 * exact**0.5)


def test_keys_are_found_as_often_as_the_closed_form_says():
    dim, seeds_ = 32, 160
    angles = torch.linspace(0.15, 2.2, 24)
    q = torch.zeros(1, 1, 1, dim)
    q[..., 0] = 1
    side = torch.nn.functional.normalize(torch.randn(24, dim - 1, generator=generator(0)), dim=-1)
    k = torch.cat([angles.cos()[:, None], angles.sin()[:, None] * side], -1).view(1, 1, 24, dim)
    tables, bits = 64, 4
    often = torch.zeros(24)
    for seed in range(seeds_):
        encoder = SimHash(CollisionSample(tables, bits).code_bits, centring=None, seed=seed, orthogonal=False)
        often += (collisions(encoder.encode_query(q), encoder.encode_key(k), tables, bits) >= 2)[0, 0, 0]
    p = Collisions(tables, bits).probability(angles.cos()).float()
    assert p.min() < 0.3  # both ends of the scale are looked at
    assert p.max() > 0.999
    z = (often - seeds_ * p) / (seeds_ * p * (1 - p)).clamp(min=1).sqrt()
    assert z.abs().max() < 4.5
    assert z.mean().abs() < 1.0  # 24 keys whose draws depend on each other


def test_the_published_tables_fit_a_code():
    sample = CollisionSample()
    assert (sample.tables, sample.bits, sample.code_bits) == (150, 10, 1920)
    assert HashAttention(SimHash(1920, orthogonal=False), FlatHamming(), sample, SampledAttend()).encoder.bits == 1920


def test_it_cannot_bound_what_it_reads():
    sample = CollisionSample(64, 8)
    assert (sample.budget(100), sample.samples, sample.shared) == (100, True, False)
    assert eval(repr(Sink(4) | sample)) == Sink(4) | sample


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"encoder": SimHash(256)}, ["CollisionSample", "SimHash(bits=512, orthogonal=False)", "256"]),
        ({"encoder": SimHash(512, 4)}, ["CollisionSample", "one plane", "FlatHamming()"]),
        ({"encoder": Identity(), "index": FlatDot()}, ["CollisionSample", "one plane", "SimHash"]),
        ({"attend": ExactAttend()}, ["CollisionSample", "ExactAttend()", "SampledAttend()"]),
        ({"selector": Sink(4) | CollisionSample(64, 9)}, ["CollisionSample", "576", "512"]),
        ({"selector": Momentum(CollisionSample(64, 8)), "attend": ExactAttend()}, ["Momentum", "SampledAttend()"]),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_composed(parts, words):
    good = HashAttention(SimHash(512), FlatHamming(), CollisionSample(64, 8), SampledAttend())
    raises_naming(ValueError, *words)(lambda: good.replace(**parts))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CollisionSample(1, 8), ["tables", "1"]),
        (lambda: CollisionSample(64, 0), ["bits", "0"]),
        (lambda: CollisionSample(64.0, 8), ["tables", "64.0"]),
    ],
)
def test_bad_tables_are_refused_by_name(make, words):
    raises_naming(ValueError, *words)(make)


def test_rows_too_short_for_a_centre_attend_to_everything():
    attn = HashAttention(
        SimHash(512, centring=Centring(1.0, keys=40, skip=0)), FlatHamming(), CollisionSample(64, 8), SampledAttend(),
        engine="reference",
    )  # fmt: skip
    q, k, v = qkv(0, 2, keys=65)
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=torch.tensor([0, 50]))
    output, selection = attn.run(q, cache)
    assert selected(selection.ids, 65, 4)[1, ..., 50:].all()
    alone = torch.softmax(q[1] @ k[1, :, 50:].repeat_interleave(2, 0).transpose(-1, -2) / 4, -1)
    assert torch.allclose(output.out[1], alone @ v[1, :, 50:].repeat_interleave(2, 0), atol=1e-5)
