"""Codes of the newest keys and queries, made within a compiled step, are the encoder's; and what is kept on disk."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from hashattn import (
    AsymmetricHash,
    Consensus,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    Momentum,
    Recent,
    SimHash,
    Sink,
    Tiers,
    TopK,
)
from hashattn.engines.host import maps_inside, why_not_compiled
from hashattn.ops.compiled.encode import pack
from hashattn.ops.hamming.reference import query_planes, unpack_bits
from tests.structured import generator


@pytest.mark.parametrize("planes", [1, 2, 4, 8])
@pytest.mark.parametrize("bits", [8, 64, 100, 128, 200])
def test_packed_planes_are_the_references(bits, planes):
    projected = torch.randn(7, bits, generator=generator(bits))
    projected[1] = 0
    projected[2, ::3], projected[3, 5], projected[4, 2] = torch.nan, torch.inf, -torch.inf
    projected[5] *= 1e-42
    projected[6, 1::2] = -0.0
    expected = query_planes(projected, planes).reshape(7, -1)
    words = expected.shape[1] // planes
    for row, wanted in zip(projected, expected, strict=True):
        found = np.full(planes * words + 2, 7, np.uint64)
        pack(torch.nn.functional.pad(row, (0, -bits % 64), value=-1).numpy(), bits, planes, words, found)
        assert np.array_equal(found[:-2].view(np.int64), wanted.numpy()) and (found[-2:] == 7).all()


def near_zero(projected: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Which bits lie within the rounding of a float32 sum."""
    return projected.abs() <= 1e-5 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "encoder", [SimHash(100, query_bits=2), AsymmetricHash(64), AsymmetricHash(128, query_hidden=())]
)
@pytest.mark.filterwarnings("ignore:.*is not fitted")
def test_appended_codes_are_the_encoders(encoder, dtype):
    attn = HashAttention(encoder, FlatHamming(), Sink(2) | Recent(4) | Tiers(0.1, 0.3), MixedPrecision(), engine="cpu")
    assert maps_inside(attn.parts)[1]
    g = generator(0)
    k, v = (torch.randn(2, 3, 300, 32, generator=g).to(dtype) for _ in range(2))
    cache, whole = attn.new_cache(2, 3, 32), attn.new_cache(2, 3, 32)
    with torch.no_grad():
        cache.append(k[:, :, :280], v[:, :, :280], start=torch.tensor([0, 9]))
        attn.run(torch.randn(2, 6, 1, 32, generator=g).to(dtype), cache)
        for n in range(280, 300):
            cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
            if n % 3:  # one or two keys wait
                attn.run(torch.randn(2, 6, 1, 32, generator=g).to(dtype), cache)
        attn.run(torch.randn(2, 6, 1, 32, generator=g).to(dtype), cache)
        assert cache.encoded == 300
        whole.append(k, v, start=torch.tensor([0, 9]))
        whole.indexed.centres.ready, whole.indexed.centres.frozen = [True, True], cache.indexed.centres.frozen
        linear = encoder.maps(32, k.device)[1].linear
        centred = k.double() - (0 if cache.indexed.centres.subtracted is None else cache.centre.double().unsqueeze(2))
        unsure = near_zero(centred @ linear.double(), centred.norm(dim=-1, keepdim=True) * linear.norm(dim=0).double())
        differ = unpack_bits(cache.codes, encoder.bits) != unpack_bits(whole.codes, encoder.bits)
        assert not (differ & ~unsure).any() and differ.float().mean() < 1e-3
        assert torch.allclose(cache.norms.float(), whole.norms.float(), rtol=2**-7)


def test_a_call_that_asks_for_more_goes_through_the_stages():
    attn = HashAttention(SimHash(64), FlatHamming(), TopK(k=9), engine="cpu")
    cache = attn.new_cache(1, 2, 16)
    cache.append(torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 16))
    q = torch.randn(1, 4, 1, 16, requires_grad=True)
    output, selection = attn.run(q, cache, need_lse=True, need_weights=True)
    assert output.weights.shape == (1, 4, 1, 9)
    plain, same = attn.run(q.detach(), cache, need_lse=True)
    assert torch.equal(selection.ids.sort().values, same.ids.sort().values)
    assert torch.allclose(plain.out, output.out, atol=1e-5) and torch.allclose(plain.lse, output.lse, atol=1e-5)
    output.out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_steps_that_were_made_ready_let_go_of_memory_that_a_cache_has_left():
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), TopK(k=9), engine="cpu")
    cache = attn.new_cache(1, 2, 16)
    left = None
    for keys, tokens, kept in ((40, 1, 1), (1, 2, 2), (900, 1, 1), (1, 1, 1)):
        cache.append(torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16))
        attn(torch.randn(1, 4, tokens, 16), cache)
        assert len(cache.on_device.prepared) == kept
        left = left or weakref.ref(cache.storage("keys"))
    gc.collect()
    assert left() is None


WITHOUT = """
import sys
sys.modules["numba"] = None
import torch
from hashattn import HashAttention
attn = HashAttention.from_preset("simhash_topk", engine="cpu")
print(attn.explain(q_heads=4, kv_heads=2, head_dim=16, keys=500, dtype=torch.float32))
q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 500, 16)
assert torch.allclose(attn(q, k, k), attn.replace(engine="reference")(q, k, k), atol=1e-5)
"""


def test_without_numba_the_stages_serve_and_the_plan_says_so():
    told = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True).stdout
    assert 'they need Numba: pip install "hashattn[cpu]"' in told and "FAISS's scan" in told


UNKEPT = """
import warnings
from numba.core import caching
caching.CacheImpl._locator_classes = []
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from hashattn.ops.compiled import jit
    square = jit.compiled(lambda x: x * x)
assert square(3) == 9 and "set NUMBA_CACHE_DIR" in str(said[0].message), said
"""


def test_where_nothing_can_be_kept_it_is_said_and_compiled_all_the_same():
    subprocess.run([sys.executable, "-c", UNKEPT], check=True)


KEPT = """
import sys
sys.path.insert(0, {folder!r})
import loop
for digest in (1, 2, 1):
    step = loop.kept(digest)
    assert step(5) == 5
    print(sum(step.stats.cache_hits.values()), end=" ")
"""


def test_loops_are_compiled_anew_when_any_of_their_sources_changes(tmp_path):
    source = """
from hashattn.ops.compiled.jit import compiled

def kept(digest):
    @compiled
    def step(x):
        return x if digest >= 0 else -x
    return step
"""
    (tmp_path / "loop.py").write_text(source)
    code = KEPT.format(folder=str(tmp_path))
    told = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    ]
    assert told == ["0 0 1 ", "1 1 1 "]


def test_the_plan_names_what_runs():
    attn = HashAttention.from_preset("simhash_topk", engine="cpu")
    plan = str(attn.explain(q_heads=4, kv_heads=2, head_dim=64, keys=5000, dtype=torch.float32))
    assert "compiled loops" in plan and "queries and the newest keys in the step" in plan
    other = HashAttention.from_preset("dashkv", engine="cpu")
    told = str(other.explain(q_heads=4, kv_heads=2, head_dim=64, keys=5000, dtype=torch.float32))
    assert "raw and of calibrated distances" in told and "MixedPrecision" in told
    crossed = other.replace(selector=Consensus(Momentum(TopK(k=9))))
    told = str(crossed.explain(q_heads=4, kv_heads=2, head_dim=64, keys=5000, dtype=torch.float32))
    assert "compiled loops serve TopK, Threshold and Tiers, raw or calibrated, not" in told
    assert why_not_compiled(HashAttention.from_preset("streaming").parts, None) == [  # type: ignore[arg-type]
        "compiled loops serve binary codes in a FlatHamming index"
    ]
