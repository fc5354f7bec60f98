"""Encoding many keys at once in CUDA C++ without a GPU: emulated against PyTorch, and compiled for A100s and H100s."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hashattn import (
    AsymmetricHash,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    SimHash,
    SymmetricHash,
    Tiers,
    TopK,
)
from hashattn.ops.decode import encode_reference, encodes_many
from hashattn.ops.decode.cuda import InCuda, compiler
from hashattn.ops.decode.cuda.encode_many import encode_many, launch
from tests.ops.decode import encoding
from tests.ops.decode.emulator import run
from tests.ops.decode.encoding import MANY
from tests.structured import qkv

triton = pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")
pytestmark = pytest.mark.filterwarnings("ignore:this .* is not fitted")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dim", "dtype", "bits"), [(128, torch.bfloat16, 64), (96, torch.float16, 100), (256, torch.float32, 256)]
)
def test_the_kernel_compiles_without_spills(dim, dtype, bits, arch, tmp_path):
    one, path = launch(dim, dtype, bits, 1), tmp_path / "encode_many.cubin"
    path.write_bytes(compiler.compile(one.name, one.defines, arch))
    usage = subprocess.run([TOOL, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+)", usage) == ["0"], usage


@pytest.fixture
def emulated(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    run.emulate(monkeypatch)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("encoder", "shape"), MANY)
def test_many_keys_are_encoded_at_once(emulated, encoder, shape, backwards, monkeypatch):
    if backwards:
        monkeypatch.setattr(compiler, "Launcher", run.Backwards)
    encoding.encodes_many(encode_many, encoder, **shape)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, 1e38])
def test_what_is_not_finite_gives_the_references_bits(emulated, value):
    by = SimHash(64).maps(64, torch.device("cpu"))[1]
    k = torch.randn(1, 2, 9, 64, generator=torch.Generator().manual_seed(1))
    k[0, 0, 3], k[0, 1, 5, 7] = value, value
    (codes, norms), (exact, expected) = (f(k, None, by, True) for f in (encode_many, encode_reference.encode_many))
    assert torch.equal(codes[0, 0, 3], exact[0, 0, 3]) and torch.equal(codes[0, 1, 5], exact[0, 1, 5])
    assert torch.allclose(norms.float(), expected.float(), rtol=2**-7, equal_nan=True)


@pytest.mark.parametrize(
    "encoder", [SimHash(64), AsymmetricHash(64), SymmetricHash(64)], ids=lambda e: type(e).__name__
)
def test_a_cache_encodes_so_what_a_prefill_appended(emulated, encoder, monkeypatch):
    attn = HashAttention(encoder, FlatHamming(), Tiers(0.1, 0.3), MixedPrecision(), engine="reference")
    _, k, v = qkv(3, 2, keys=280, dim=64)
    caches = [attn.new_cache(2, 2, 64) for _ in range(2)]
    made = []
    for cache, fused in zip(caches, (False, True), strict=True):
        with monkeypatch.context() as patch:
            if fused:
                patch.setattr("hashattn.ops.decode.DEVICES", ("cpu",))
                patch.setattr("hashattn.ops.decode.kernels_on", lambda _: made.append(1) or InCuda())
            cache.append(k + 1, v, start=torch.tensor([0, 9]))
            cache.encode()
            cache.append(k[:, :, :7], v[:, :, :7])
            cache.encode()
    plain, fused = caches
    assert len(made) == (0 if encoder.widths()[1] else 2)
    centred = plain.keys - plain.centre.unsqueeze(2)
    encoding.same_bits(fused.codes.unsqueeze(3), centred, encoder.maps(64, torch.device("cpu"))[1], 1)
    assert torch.equal(plain.centre, fused.centre)
    encoding.same_norms(fused.norms, fused.keys, fused.centre)


@pytest.mark.filterwarnings("default")
def test_an_encoder_that_is_not_fitted_warns_also_then(emulated, monkeypatch):
    monkeypatch.setattr("hashattn.ops.decode.DEVICES", ("cpu",))
    monkeypatch.setattr("hashattn.ops.decode.kernels_on", lambda _: InCuda())
    attn = HashAttention(AsymmetricHash(64, centring=None), FlatHamming(), TopK(k=5))
    cache, (_, k, v) = attn.new_cache(1, 2, 64), qkv(3, keys=9, dim=64)
    cache.append(k, v)
    with pytest.warns(UserWarning, match="not fitted"):
        cache.encode()


@pytest.mark.parametrize("view", ["transposed", "every other", "rows of another order", "shifted"])
def test_keys_may_be_any_view(emulated, view):
    g, by = torch.Generator().manual_seed(2), SimHash(64).maps(64, torch.device("cpu"))[1]
    held = torch.randn(2, 3, 40, 128, generator=g)
    k = {
        "transposed": held[..., :64].transpose(2, 1).contiguous().transpose(2, 1),
        "every other": held[:, :, ::2, :64],
        "rows of another order": held.transpose(0, 1)[:, :, :, :64].contiguous().transpose(0, 1),
        "shifted": held.flatten()[1 : 1 + 2 * 3 * 40 * 64].view(2, 3, 40, 64),
    }[view]
    codes, exact = encode_many(k, None, by, False)[0], encode_many(k.contiguous().clone(), None, by, False)[0]
    assert torch.equal(codes, exact)


@pytest.mark.parametrize(
    ("widths", "dim", "dtype", "served"),
    [
        (((), ()), 64, torch.bfloat16, True),
        (((256, 256), ()), 128, torch.float32, True),
        (((), (8,)), 64, torch.bfloat16, False),
        (None, 64, torch.bfloat16, False),
        (((), ()), 80, torch.bfloat16, False),
        (((), ()), 64, torch.float64, False),
    ],
)
def test_which_keys_are(monkeypatch, widths, dim, dtype, served):
    k = torch.empty(1, 1, 1, dim, dtype=dtype)
    assert not encodes_many(k, widths)  # on the CPU
    monkeypatch.setattr("hashattn.ops.decode.DEVICES", ("cpu",))
    assert encodes_many(k, widths) == served
    assert not encodes_many(k.requires_grad_(), widths)
