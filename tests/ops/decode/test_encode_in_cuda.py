"""Encoding and appending in CUDA C++ without a GPU: emulated against PyTorch, and compiled for A100s and H100s."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hashattn import AsymmetricHash, SimHash, SymmetricHash
from hashattn.ops.decode import encode_reference, kernels_on
from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.cuda.encode import Prepared, encode, encode_placed, launch
from hashattn.ops.decode.sizes import Encoding
from tests.ops.decode.emulator import run
from tests.ops.decode.encoding import SMALL, encodes, encodes_placed, given, twin

triton = pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHAPES = [  # queries and keys, widths, bits, query_bits, dim, dtype
    ((32, 8), ((), ()), 64, 1, 128, torch.bfloat16),
    ((32, 8), ((256, 256), ()), 64, 1, 128, torch.bfloat16),
    ((256, 64), ((256, 256), ()), 64, 1, 128, torch.bfloat16),
    ((64, 16), ((128, 128), (128, 128)), 128, 2, 96, torch.float16),
    ((4096, 512), ((512, 512), (300, 17)), 256, 2, 256, torch.float32),
    ((9, 3), ((512,), (512, 512)), 256, 1, 256, torch.bfloat16),
]


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("counts", "widths", "bits", "query_bits", "dim", "dtype"), SHAPES)
def test_the_kernel_compiles_without_spills(counts, widths, bits, query_bits, dim, dtype, arch, placed, tmp_path):
    one = launch(
        Encoding(counts, widths, bits), dim, dtype, bits // 64, query_bits, unit=bool(widths[0]), placed=placed
    )
    path = tmp_path / "encode.cubin"
    path.write_bytes(compiler.compile(one.name, one.defines, arch))
    usage = subprocess.run([TOOL, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+)", usage) == ["0"], usage


@pytest.mark.parametrize("widths", [((), ()), ((256, 256), ())], ids=["linear", "MLP"])
def test_weights_are_asked_for_before_the_kernel_before_has_ended(widths, tmp_path):
    one = launch(Encoding((32, 8), widths, 64), 128, torch.bfloat16, 1, 1, unit=False)
    path = tmp_path / "encode.cubin"
    path.write_bytes(compiler.compile(one.name, one.defines, 90))
    code = subprocess.run([TOOL, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(LDG|ACQBULK|PREEXIT|BAR)\b", code)
    waits = [i for i, name in enumerate(found) if name == "ACQBULK"]
    assert len(waits) == 2 + bool(widths[0])  # of a slice, and of the linear maps of queries and keys
    for i in waits:
        assert found[max(0, i - 32) : i] == ["LDG"] * 32  # all of them, and nothing that waits
        assert found[i + 1] == "PREEXIT"


@pytest.fixture
def emulated(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    run.emulate(monkeypatch)


LARGE = [
    (SimHash(64), {"dim": 128, "batch": 3, "kv_heads": 4, "group": 5, "dtype": torch.bfloat16}),  # 4 together
    (AsymmetricHash(64), {"dim": 128, "batch": 8, "kv_heads": 2, "group": 5, "dtype": torch.bfloat16}),  # 8 together
    (AsymmetricHash(256, query_hidden=(300, 500), key_hidden=(512, 17), query_bits=2), {"dim": 256, "tokens": 16,
     "dtype": torch.float16}),
    (AsymmetricHash(200, query_hidden=(512,), key_hidden=(257,)), {"dim": 96, "tokens": 2, "kv_heads": 1}),
    (SymmetricHash(256), {"dim": 256, "group": 16, "dtype": torch.bfloat16}),
]  # fmt: skip


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("encoder", "shape"), SMALL + LARGE)
def test_newest_queries_and_keys_are_encoded_and_appended(emulated, encoder, shape, backwards, monkeypatch):
    if backwards:
        monkeypatch.setattr(compiler, "Launcher", run.Backwards)
    encodes(encode, encoder, **shape)


@pytest.mark.parametrize(("encoder", "shape"), SMALL[1:9:3])
def test_they_are_appended_where_the_host_says(emulated, encoder, shape):
    encodes(encode, encoder, **shape, norms=True, known=True)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(("encoder", "shape"), SMALL + LARGE[:2])
def test_queries_are_encoded_and_new_keys_that_are_in_place(emulated, encoder, shape, new, backwards, monkeypatch):
    if backwards:
        monkeypatch.setattr(compiler, "Launcher", run.Backwards)
    encodes_placed(encode_placed, encoder, **shape, new=new, norms=True)


@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(64, query_hidden=(20, 20))], ids=["linear", "MLP"])
@pytest.mark.parametrize(("filled", "room", "code_room"), [(49, 50, 64), (50, 64, 50), (70, 50, 64)])
def test_what_does_not_fit_is_dropped_and_counted(emulated, encoder, filled, room, code_room):
    encodes(encode, encoder, dim=64, tokens=3, filled=filled, room=room, code_room=code_room)


@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(64, key_hidden=(9, 9))], ids=["linear", "MLP"])
def test_norms_are_appended_if_they_are_kept(emulated, encoder):
    x = given(encoder, filled=28)
    encode(x)
    expected = (x.k - x.centre.unsqueeze(2)).norm(dim=-1, keepdim=True)[:, :, :2]
    norms = x.stored.norms
    assert ((norms[:, :, 28:] - expected).abs() <= expected * 2**-8).all()
    assert (norms[:, :, :28] == -1).all()


@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(64, key_hidden=(9, 9))], ids=["linear", "MLP"])
def test_what_is_made_ready_serves_other_vectors(emulated, encoder):
    x = given(encoder, filled=20)
    other, made = twin(x), Prepared(x)
    for _ in range(3):
        q, k, v = (torch.randn_like(part) for part in (x.q, x.k, x.v))
        assert torch.equal(made(q, k, v), encode(replace(other, q=q, k=k, v=v)))
    held, expected = x.stored, other.stored
    for name in ("keys", "values", "codes", "length", "norms"):
        assert torch.equal(getattr(held, name), getattr(expected, name))


@pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")  # by NumPy in the reference
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, 1e38])
@pytest.mark.parametrize(
    "encoder",
    [
        SimHash(64, query_bits=2), AsymmetricHash(100, query_hidden=(40, 24), query_bits=2),
        AsymmetricHash(64, query_hidden=(24,), key_hidden=(24, 9)),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_finite_gives_the_references_bits(emulated, encoder, value):
    x = given(encoder)
    x.q[0, 2, 1], x.k[1, 1, 2] = value, value
    x.q[1, 3, 0, 5], x.k[0, 0, 1, 7] = value, value
    other = twin(x)
    expected, found = encode_reference.encode(other), encode(x)
    assert all(torch.equal(found[at], expected[at]) for at in [(0, 2, 1), (1, 3, 0)])
    codes, exact = x.stored.codes, other.stored.codes
    assert torch.equal(codes[1, 1, 22], exact[1, 1, 22]) and torch.equal(codes[0, 0, 21], exact[0, 0, 21])


def test_triton_encodes_where_cuda_cannot_be_compiled(emulated, monkeypatch):
    device = torch.device("cuda")
    assert kernels_on(device).language == "CUDA C++"
    monkeypatch.setattr(compiler, "why_not", lambda: "it is not installed")
    assert kernels_on(device).language == "Triton"


def test_too_few_counters_are_refused(emulated):
    x = given(AsymmetricHash(64))
    with pytest.raises(ValueError, match="arrived has 1 numbers, 13 are needed"):
        encode(replace(x, arrived=x.arrived[:1]))
