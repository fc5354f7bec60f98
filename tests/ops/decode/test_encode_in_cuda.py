"""Encoding and appending in CUDA C++ without a GPU: emulated against PyTorch, and compiled for A100s and H100s."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hashattn import AsymmetricHash, SimHash, SymmetricHash
from hashattn.ops.decode import append_reference, gpu
from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.cuda import encode as in_cuda
from hashattn.ops.decode.cuda.encode import encode, launch
from hashattn.ops.decode.sizes import Encoding
from tests.ops.decode.emulator import run
from tests.ops.decode.encoding import SMALL, encodes, encoding_state, randomised
from tests.structured import generator

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


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("counts", "widths", "bits", "query_bits", "dim", "dtype"), SHAPES)
def test_the_kernel_compiles_without_spills(counts, widths, bits, query_bits, dim, dtype, arch, tmp_path):
    one = launch(Encoding(counts, widths, bits), dim, dtype, bits // 64, query_bits, unit=bool(widths[0]))
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
    monkeypatch.setattr(compiler, "launch", functools.partial(run.launch, backwards=backwards))
    encodes(encode, encoder, **shape)


@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(64, query_hidden=(20, 20))], ids=["linear", "MLP"])
@pytest.mark.parametrize(("filled", "room", "code_room"), [(49, 50, 64), (50, 64, 50), (70, 50, 64)])
def test_what_does_not_fit_is_dropped_and_counted(emulated, encoder, filled, room, code_room):
    encodes(encode, encoder, dim=64, tokens=3, filled=filled, room=room, code_room=code_room)


def given(encoder, *, tokens=3, dim=64, filled=20, room=30):
    """What encode is given, and bfloat16 norms, for 12 queries and 4 keys at a time."""
    g, (batch, kv_heads, q_heads) = generator(7), (2, 2, 6)
    maps = randomised(encoder, dim).maps(dim, torch.device("cpu"))
    q = torch.randn(batch, q_heads, tokens, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, generator=g) for _ in range(2))
    centre, length = torch.randn(batch, kv_heads, dim, generator=g), torch.tensor([filled], dtype=torch.int32)
    keys, values = (torch.zeros(batch, kv_heads, room, dim) for _ in range(2))
    codes = torch.zeros(batch, kv_heads, room, -(-encoder.bits // 64), dtype=torch.int64)
    call = q, k, v, centre, maps, encoder.query_bits, keys, values, codes, length, *encoding_state(q, k, codes, maps)
    return call, torch.full((batch, kv_heads, room), -1.0, dtype=torch.bfloat16)


@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(64, key_hidden=(9, 9))], ids=["linear", "MLP"])
def test_norms_are_appended_if_they_are_kept(emulated, encoder):
    call, norms = given(encoder, filled=28)
    encode(*call, norms)
    expected = (call[1] - call[3].unsqueeze(2)).norm(dim=-1)[:, :, :2]
    assert ((norms[:, :, 28:] - expected).abs() <= expected * 2**-8).all()
    assert (norms[:, :, :28] == -1).all()


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
    (q, k, *rest), _ = given(encoder)
    q[0, 2, 1], k[1, 1, 2] = value, value
    q[1, 3, 0, 5], k[0, 0, 1, 7] = value, value
    *maps_and_held, arrived, workspace = rest
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in maps_and_held]
    expected = append_reference.encode(q, k, *copies)
    found = encode(q, k, *maps_and_held, arrived, workspace)
    special = [(0, 2, 1), (1, 3, 0)]
    assert all(torch.equal(found[at], expected[at]) for at in special)
    codes, exact = maps_and_held[-2], copies[-2]
    assert torch.equal(codes[1, 1, 22], exact[1, 1, 22]) and torch.equal(codes[0, 0, 21], exact[0, 0, 21])


def test_triton_encodes_where_cuda_cannot_be_compiled(emulated, monkeypatch):
    from hashattn.ops.decode import encode as in_triton

    call, _ = given(SimHash(64))
    for language in (in_cuda, in_triton):
        monkeypatch.setattr(language, "encode", lambda *_, name=language.__name__: name)
    assert gpu.encode(*call) == in_cuda.__name__
    monkeypatch.setattr(compiler, "why_not", lambda: "it is not installed")
    assert gpu.encode(*call) == in_triton.__name__


def test_too_few_counters_are_refused(emulated):
    call, _ = given(AsymmetricHash(64))
    with pytest.raises(ValueError, match="arrived has 1 numbers, 13 are needed"):
        encode(*call[:-2], call[-2][:1], call[-1])
