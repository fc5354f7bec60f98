"""A decoder whose kernels run on a CPU, those in Triton interpreted and those in CUDA C++ emulated, as it decodes."""

import shutil

import pytest
import torch

from hashattn import (
    AsymmetricHash,
    ExactAttend,
    FlatHamming,
    HashAttention,
    LocalTopK,
    MixedPrecision,
    Recent,
    SimHash,
    Sink,
    Tiers,
    TopK,
)
from hashattn.ops import decode
from hashattn.ops.decode import library, served_by
from tests.ops.decode.emulator.run import emulate
from tests.ops.decode.encoding import same_norms
from tests.structured import qkv

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_on_a_gpu.py", allow_module_level=True)

from hashattn.ops.decode.cuda import InCuda
from hashattn.ops.decode.triton import InTriton


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++, which is not here")
@pytest.mark.filterwarnings("ignore:this AsymmetricHash is not fitted:UserWarning")
@pytest.mark.parametrize(
    ("encoder", "selector", "attend", "encoding"),
    [
        (SimHash(64), TopK(share=0.1), ExactAttend(), InCuda()),
        (SimHash(128), TopK(share=0.1, per="kv_head"), ExactAttend(), InCuda()),
        (SimHash(64), LocalTopK(64), ExactAttend(), InTriton()),
        (AsymmetricHash(128, query_bits=2), TopK(share=0.1), ExactAttend(), InCuda()),
        (AsymmetricHash(64, query_hidden=(20, 20)), TopK(share=0.1), ExactAttend(), InTriton()),
        (AsymmetricHash(64, heads=2), TopK(k=50), ExactAttend(), InCuda()),
        (SimHash(128), Tiers(0.05, 0.1, per="kv_head"), MixedPrecision(), InCuda()),
        (SimHash(64), Tiers(0.05, 0.1), MixedPrecision(), InTriton()),
        (AsymmetricHash(64, heads=2), Tiers(0.05, 0.1), MixedPrecision(), InCuda()),
    ],
    ids=[
        "sign", "kv_head", "local", "MLP", "MLP in Triton", "in PyTorch", "tiers", "tiers in Triton",
        "tiers in PyTorch",
    ],
)  # fmt: skip
@torch.inference_mode()
def test_a_decoder_does_what_the_reference_does_until_the_cache_is_full(
    encoder, selector, attend, encoding, monkeypatch
):
    monkeypatch.setattr(decode.request, "DEVICES", ("cpu",))
    emulate(monkeypatch)
    monkeypatch.setattr(library, "kernels_for", lambda request: served_by(request)[0])
    monkeypatch.setattr(library, "kernels_on", lambda device: encoding)
    q, k, v = qkv(7, 2, keys=324, dim=64, group=4)
    queries = torch.randn(4, *q.shape)
    attn = HashAttention(encoder, FlatHamming(), Sink(4) | Recent(9) | selector, attend, engine="gpu")
    plain, caches = attn.replace(engine="reference"), [attn.new_cache(2, 2, 64, capacity=324) for _ in range(2)]
    for cache in caches:
        cache.append(k[:, :, :320], v[:, :, :320], start=torch.tensor([0, 50]))
    decoder, close = attn.decoder(caches[0]), []
    for n in range(320, 324):
        step = queries[n - 320], k[:, :, n : n + 1], v[:, :, n : n + 1]
        out = decoder(*step)
        caches[1].append(*step[1:])
        close.append((out - plain(step[0], caches[1])).abs().amax(-1) < 1e-5)
    assert torch.stack(close).float().mean() > 0.97  # a bit within rounding of zero may move a key at the cut
    assert len(decoder.finish()) == 324
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)
    assert (caches[0].codes != caches[1].codes).float().mean() < 1e-3
    if attend.needs_norms:
        same_norms(caches[0].norms, caches[0].keys, caches[0].centre)
    assert decoder(*step).isnan().all()
    with pytest.raises(ValueError, match="capacity is 324 columns, but 325"):
        decoder.finish()
