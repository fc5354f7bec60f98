"""What is not finite, beyond 32 bits or not where kernels expect it, on a GPU. Run with pytest -m gpu."""

import gc
import importlib
from dataclasses import replace

import pytest
import torch

from hashattn import ExactAttend, FlatHamming, HashAttention, SimHash, TopK
from hashattn.engines.fused import Prepared, packed
from hashattn.ops.decode import Newest, Rule, Scratch, Stored, encode_reference
from tests.ops.decode.broken import RULES, TIERS, breaks_as_the_reference_does
from tests.ops.decode.cases import BEYOND, agrees, inputs, moved, ready, same, shifted, stored
from tests.ops.decode.encoding import encoding, randomised, twin
from tests.structured import generator, qkv

pytestmark = pytest.mark.gpu
BY_ROW = [Rule(k=20), Rule(k=20, shared=True), Rule(k=16, chunks=2)]


@pytest.fixture(scope="module", params=["cuda", "triton"], ids=["CUDA C++", "Triton"])
def decode(request):
    return importlib.import_module(f"hashattn.ops.decode.{request.param}.decode").decode


@pytest.mark.parametrize("scale", [0.125, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nan_in_nan_out(decode, rule, dtype, scale):
    breaks_as_the_reference_does(decode, rule, dtype=dtype, device="cuda", scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", TIERS, ids=str)
def test_nan_in_nan_out_with_tiers(rule, dtype):
    from hashattn.ops.decode.triton.decode import decode

    breaks_as_the_reference_does(decode, rule, dtype=dtype, device="cuda")


@pytest.mark.parametrize("language", ["cuda", "triton"], ids=["CUDA C++", "Triton"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("bits", [1, 2])
def test_what_is_not_finite_gives_the_references_bits(language, value, bits):
    encode = importlib.import_module(f"hashattn.ops.decode.{language}.encode").encode
    encoder, g = SimHash(64, query_bits=bits), generator(3)
    maps = tuple(randomised(encoder, 64).maps(64, torch.device("cuda")))
    q = torch.randn(2, 6, 3, 64, generator=g).cuda()
    k, v = (torch.randn(2, 2, 3, 64, generator=g).cuda() for _ in range(2))
    q[0, 2, 1], q[1, 3, 0, 5], k[1, 1, 2], k[0, 0, 1, 7] = value, value, value, value
    centre, length = torch.zeros(2, 2, 64, device="cuda"), torch.tensor([20], dtype=torch.int32, device="cuda")
    keys, values = (torch.zeros(2, 2, 30, 64, device="cuda") for _ in range(2))
    codes = torch.zeros(2, 2, 30, 1, dtype=torch.int64, device="cuda")
    x = encoding(Newest(q, k, v, centre, maps, bits, Stored(keys, values, codes, length)))
    other = twin(x)
    expected, found, exact = encode_reference.encode(other), encode(x), other.stored.codes
    assert all(torch.equal(found[at], expected[at]) for at in [(0, 2, 1), (1, 3, 0)])
    assert torch.equal(codes[1, 1, 22], exact[1, 1, 22]) and torch.equal(codes[0, 0, 21], exact[0, 0, 21])


@pytest.mark.parametrize("rule", BEYOND, ids=str)
def test_numbers_beyond_32_bits_mean_everything(decode, rule):
    agrees(decode, moved(inputs(1, filled=150, room=160, group=2), "cuda"), rule)


@pytest.mark.parametrize("rule", BY_ROW, ids=str)
def test_queries_may_be_any_view(decode, rule):
    x = ready(moved(inputs(4, filled=150, room=160, group=2, dtype=torch.bfloat16), "cuda"), rule)
    expected = decode(x)
    assert same(decode(replace(x, q=shifted(x.q))), expected)


@pytest.mark.parametrize("rule", BY_ROW, ids=str)
def test_rows_beyond_65535(decode, rule):
    shape = {"batch": 2100, "kv_heads": 8, "filled": 60, "room": 64}
    agrees(decode, moved(inputs(5, **shape, dtype=torch.bfloat16), "cuda"), rule, hints=(None, None))


@pytest.mark.parametrize("rule", [Rule(k=40), Rule(k=40, shared=True), Rule(k=2048, chunks=256)], ids=str)
def test_columns_beyond_two_to_the_31_elements(decode, rule):
    x, ahead = moved(inputs(6, filled=391, room=400, group=2, dim=256, dtype=torch.bfloat16), "cuda"), 2**23
    assert ahead * 256 == 2**31 and ahead % (8 * 256) == 0  # chunks are dealt the same columns

    def late(held):
        new = held.new_zeros(1, 1, ahead + 400, held.shape[3])
        new[:, :, ahead:] = held
        return new

    wide = {name: late(getattr(x.stored, name)) for name in ("keys", "values", "codes")}
    far = replace(stored(x, **wide, length=x.stored.length + ahead), starts=x.starts + ahead)
    (out, lse, ids, *_), (exact, exact_lse, expected, *_) = (decode(ready(y, rule)) for y in (far, x))
    assert torch.equal(ids, torch.where(expected < 0, -1, expected + ahead))
    assert (out - exact).abs().max() < 2e-2 and (lse - exact_lse).abs().max() < 1e-3


@pytest.mark.parametrize("rule", [Rule(k=40), Rule(k=40, shared=True)], ids=str)
def test_a_head_beyond_two_to_the_31_elements(decode, rule):
    x, room = moved(inputs(7, kv_heads=3, filled=2100, room=2112, dtype=torch.bfloat16), "cuda"), 2**25
    held = {name: torch.empty(1, 3, room, 64, dtype=torch.bfloat16, device="cuda") for name in ("keys", "values")}
    for name, wide in held.items():
        wide[:, :, :2112] = getattr(x.stored, name)
    assert same(decode(ready(stored(x, **held), rule)), decode(ready(x, rule)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two GPUs")
@pytest.mark.parametrize("rule", BY_ROW, ids=str)
def test_kernels_run_where_their_tensors_are(decode, rule):
    assert torch.cuda.current_device() == 0
    for place in ("cuda:1", "cuda:0", "cuda:1"):
        agrees(decode, moved(inputs(8, filled=150, room=160, group=2), place), rule, hints=(None, None))
    assert torch.cuda.current_device() == 0


def test_streams_have_scratch_of_their_own_and_what_is_too_small_is_freed():
    scratch, device, other = Scratch(), torch.device("cuda"), torch.cuda.Stream()
    first = scratch.workspace(1 << 20, device)
    with torch.cuda.stream(other):
        second = scratch.workspace(1 << 20, device)
    assert first.data_ptr() != second.data_ptr() and scratch.workspace(9, device) is first
    del first, second
    gc.collect()
    torch.cuda.synchronize()
    scratch.workspace(1 << 21, device)
    assert scratch.nbytes == (1 << 21) + (1 << 20)


@torch.no_grad()
def test_a_captured_step_keeps_its_scratch_when_more_is_needed():
    q, k, v = (x.cuda() for x in qkv(7, 1, keys=3000, dim=64, group=4, dtype=torch.bfloat16))
    attn = HashAttention(SimHash(64), FlatHamming(), TopK(k=300), ExactAttend(), engine="gpu")
    scratch, stream = Scratch(), torch.cuda.Stream()
    small, large = (attn.new_cache(1, k.shape[1], 64, scratch=scratch) for _ in range(2))
    small.append(k[:, :, :500], v[:, :, :500])
    large.append(k, v)
    for cache in (small, large):
        cache.encode()
    query, lengths = packed(attn.encoder, q), torch.tensor([500, 3000], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()

    def step(cache, length):
        return Prepared.of(attn.parts, cache, (q.shape[1], 1), length).step(q, query, 0.125)[0].out

    with torch.cuda.stream(stream):
        expected = step(small, lengths[:1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step(small, lengths[:1])
        before = scratch.nbytes
        step(large, lengths[1:])
        assert scratch.nbytes > 2 * before  # the larger one, and what the graph points to
        filler = [torch.full((1 << 18,), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(64)]
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected) and all((x == 0x7F).all() for x in filler)
