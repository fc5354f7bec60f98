"""The kernels in CUDA C++ without a GPU: emulated against their reference, and compiled for A100s and H100s."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hashattn.ops.decode import KernelRequest, Rule, Sizes, kernels_on, reference, served_by
from hashattn.ops.decode.cuda import InCuda, compiler
from hashattn.ops.decode.cuda.decode import Prepared
from hashattn.ops.decode.cuda.launches import launches
from tests.ops.decode.cases import (
    CALIBRATED_CASES,
    CASES,
    LOCAL_CASES,
    TIER_CASES,
    WORST,
    agrees,
    inputs,
    kept_before,
    ready,
    same,
)
from tests.ops.decode.emulator.run import Backwards, Launcher, emulate

triton = pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BOTH = {"vote_share": 0.5, "vote_discount": 2, "prior_ratio": 1.0, "prior_discount": 2}
SHAPES = [
    ({"q_heads": 32, "planes": 1, "words": 1, "head_dim": 128}, torch.bfloat16, Rule(k=1024)),
    ({"q_heads": 32, "planes": 1, "words": 1, "head_dim": 128}, torch.bfloat16, Rule(k=1024, shared=True)),
    ({"q_heads": 32, "planes": 1, "words": 1, "head_dim": 128}, torch.bfloat16, Rule(k=1024, chunks=64)),
    ({"q_heads": 24, "planes": 2, "words": 2, "head_dim": 96}, torch.float16, Rule(share=0.1, recents=9)),
    ({"q_heads": 128, "planes": 1, "words": 4, "head_dim": 256}, torch.float16, Rule(k=64, shared=True, radius=400)),
    ({"q_heads": 16, "planes": 2, "words": 4, "head_dim": 256}, torch.float32, Rule(k=64, chunks=1)),
    ({"q_heads": 128, "planes": 2, "words": 4, "head_dim": 256}, torch.float32, Rule(k=64, shared=True)),
    ({"q_heads": 32, "planes": 2, "words": 4, "head_dim": 128}, torch.float16, Rule(k=64, shared=True)),
    ({"q_heads": 32, "planes": 1, "words": 2, "head_dim": 128}, torch.bfloat16, Rule(k=1024, biased=True)),
    ({"q_heads": 24, "planes": 1, "words": 2, "head_dim": 64}, torch.bfloat16, Rule(k=64, shared=True, biased=True)),
    ({"q_heads": 32, "planes": 1, "words": 2, "head_dim": 64}, torch.float16, Rule(k=1024, chunks=64, biased=True)),
    ({"q_heads": 32, "planes": 1, "words": 2, "head_dim": 128}, torch.bfloat16, Rule(share=0.1, critical=0.05)),
    ({"q_heads": 32, "planes": 1, "words": 2, "head_dim": 128}, torch.bfloat16, Rule(share=0.1, critical=0.05, **BOTH)),
    ({"q_heads": 32, "planes": 2, "words": 2, "head_dim": 128}, torch.float16, Rule(k=64, shared=True, **BOTH)),
    (
        {"q_heads": 64, "planes": 1, "words": 4, "head_dim": 256},
        torch.float32,
        Rule(share=0.1, critical=0.05, shared=True, **BOTH),
    ),
]


def sizes(shape, rule):
    return Sizes(1, shape["q_heads"], 8, 1, shape["head_dim"], 4096, 4096, shape["planes"], shape["words"], rule)


@pytest.mark.parametrize(
    ("shape", "dtype", "rule", "arch"), [(*case, (80, 90)[i % 2]) for i, case in enumerate(SHAPES)]
)
def test_kernels_compile_without_spills(shape, dtype, rule, arch, tmp_path):
    assert compiler.why_not() is None
    tiers = rule.critical is not None
    many, few = (
        launches(sizes(shape, rule), dtype, True, True, multiprocessors, tiers) for multiprocessors in (132, 1)
    )
    for one in dict.fromkeys(replace(one, even=False) for one in many + few):
        path = tmp_path / f"{one.name}.cubin"
        path.write_bytes(compiler.compile(one.name, one.defines, arch))
        usage, code = (
            subprocess.run([TOOL, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
        stacks = re.findall(r"STACK:(\d+)", usage)
        assert stacks and not any(map(int, stacks)), (one, usage)
        assert "POPC" in code


@pytest.fixture
def emulated(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    return emulate(monkeypatch)


TWO = {"batch": 2, "kv_heads": 2, "filled": 820, "room": 1025, "starts": (0, 70)}


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
@pytest.mark.parametrize(
    ("shape", "rule", "dtype"),
    [
        *((shape, rule, torch.bfloat16) for shape, rule in (CASES + LOCAL_CASES)[1::2]),
        *((shape, rule, torch.float16) for shape, rule in CASES[2:5:2]),
        (*CASES[2], torch.float32), (*LOCAL_CASES[2], torch.float32),
    ],
)  # fmt: skip
def test_kernels_do_what_their_reference_does(emulated, shape, rule, dtype):
    agrees(emulated, inputs(1, **shape, dtype=dtype), rule)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
@pytest.mark.parametrize(("shape", "rule"), TIER_CASES[::2])
def test_tiers_are_those_of_the_reference(emulated, shape, rule):
    agrees(emulated, inputs(1, **shape), rule)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
@pytest.mark.parametrize(("shape", "rule"), CALIBRATED_CASES[::2])
def test_votes_and_a_prior_change_what_is_kept_as_the_reference_says(emulated, shape, rule):
    x = inputs(1, **shape, dtype=(torch.float32, torch.bfloat16)[rule.shared])
    agrees(emulated, replace(x, before=kept_before(x, shared=rule.shared)), rule, hints=(None, None, 0, WORST))


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(share=0.05, sinks=4, recents=8), Rule(k=64, chunks=4, sinks=4, recents=8),
        Rule(share=0.1, shared=True, sinks=4),
    ],
    ids=str,
)  # fmt: skip
def test_hints_of_other_lengths_change_nothing(emulated, rule, words):
    x = ready(inputs(4, **TWO, words=words, planes=words), rule, scale=0.1)
    x.stored.keys.normal_(), x.stored.values.normal_()
    for filled in (700, 720, 721, 820, 300):
        x.stored.length.fill_(filled)
        (out, lse, ids, *_), (exact, exact_lse, expected, *_) = emulated(x), reference(x)
        assert torch.equal(ids[..., : expected.shape[-1]], expected)
        assert (out - exact).abs().max() < 1e-5 and (lse - exact_lse).abs().max() < 1e-5


@pytest.mark.parametrize("launcher", [Launcher, Backwards])
@pytest.mark.parametrize("rule", [Rule(k=1100, sinks=3), Rule(k=130, shared=True, recents=9)], ids=str)
def test_programs_count_together_what_a_bound_missed_and_alone_whoever_waits_in_vain(
    emulated, monkeypatch, rule, launcher
):
    monkeypatch.setattr(compiler, "Launcher", launcher)  # the first of a row in one order, the last in the other
    agrees(emulated, inputs(8, filled=1501, room=1600, starts=(11,)), rule, hints=(0, None, 0))


def test_a_scan_alone_leaves_the_state_of_the_next_step_as_it_was(emulated):
    x = ready(inputs(5, filled=500, room=512), Rule(k=20))
    emulated(x)
    before = x.bounds.clone()
    for _ in range(2):
        emulated(x, scan_only=True)
    assert torch.equal(x.bounds, before)


@pytest.mark.parametrize("rule", [Rule(share=0.05, shared=True), Rule(k=64, chunks=4)], ids=str)
def test_a_step_that_is_made_ready_serves_other_queries_and_scales(emulated, rule):
    x = ready(inputs(6, **TWO), rule)
    step = Prepared(x)
    for scale in (0.1, 0.3):
        q, query = torch.randn_like(x.q), torch.randint_like(x.query, -(2**62), 2**62)
        own = replace(x, q=q, query=query, scale=scale)
        assert same(step(q, query, scale), emulated(ready(own, rule)))


def test_what_is_compiled_is_kept_and_made_anew_if_it_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path))
    (one, _) = launches(sizes(*SHAPES[0][::2]), torch.bfloat16, True, True, 132)
    first = compiler.cached(one.name, one.defines, 90)
    (path,) = (tmp_path / "kernels").iterdir()
    assert path.read_bytes() == first
    monkeypatch.setattr(compiler, "compile", lambda *_: pytest.fail("compiled again"))
    assert compiler.cached(one.name, one.defines, 90) == first
    monkeypatch.setattr(compiler, "compile", lambda *_: b"another")
    assert compiler.cached(one.name, one.defines, 80) == b"another"  # of another GPU
    monkeypatch.setenv("HASHATTN_CACHE", "/dev/null/nowhere")
    with pytest.warns(UserWarning, match="each process compiles CUDA kernels anew.*nowhere"):
        assert compiler.cached(one.name, one.defines, 90) == b"another"  # nothing can be kept there


def test_a_disk_that_is_full_is_announced_and_costs_a_compilation_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path))
    compiled = []
    monkeypatch.setattr(compiler, "compile", lambda *_: compiled.append(1) or b"machine code")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler, "keep", full)
    with pytest.warns(UserWarning, match="No space left on device; set HASHATTN_CACHE"):
        assert compiler.cached("scan", (), 90) == b"machine code"
    assert len(compiled) == 1


def test_damaged_kernels_and_those_of_others_are_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path))
    compiled = []
    monkeypatch.setattr(compiler, "compile", lambda *_: compiled.append(1) or b"machine code")
    compiler.cached("scan", (), 90)
    folder = tmp_path / "kernels"
    (path,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    for damage in (b"", b"machine cod", b"Machine code", bytes(12)):
        path.write_bytes(damage)
        assert compiler.cached("scan", (), 90) == path.read_bytes() == b"machine code"
    path.chmod(0o622)
    compiler.cached("scan", (), 90)
    assert path.stat().st_mode & 0o777 == 0o600 and len(compiled) == 6
    assert compiler.cached("scan", (), 90) == b"machine code" and len(compiled) == 6
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)  # the folder is another user's
    with pytest.warns(UserWarning, match="belongs to user"):
        assert compiler.cached("scan", (), 90) == b"machine code" and len(compiled) == 7
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "compile", lambda *_: b"machine code")
    monkeypatch.delenv("HASHATTN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.warns(UserWarning, match="there is no home folder"):
        assert compiler.cached("scan", (), 90) == b"machine code"


def nobody():
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a compute capability, as far as why_not_on() asks; what it tried to load comes back."""
    tried = []

    def of(capability, loads=lambda code: None):
        compiler.why_not_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(compiler, "_loaded", lambda code, name, device: tried.append((code, name)) or loads(code))
        return tried

    yield of
    compiler.why_not_on.cache_clear()


def test_an_architecture_that_the_compiler_does_not_know_leaves_the_step_to_triton(gpu):
    device = torch.device("cuda", 0)
    gpu((13, 7))
    (reason,) = InCuda().why_not_on(device)
    assert re.search(r"NVRTC \d+\.\d+ does not know compute capability 13\.7", reason)
    assert kernels_on(device).language == "Triton"
    tried = gpu((9, 0))
    assert InCuda().why_not_on(device) == [] and kernels_on(device).language == "CUDA C++"
    ((code, name),) = tried
    assert code.startswith(b"\x7fELF") and name == "nothing"


def test_a_driver_that_does_not_load_what_was_compiled_leaves_the_step_to_triton(gpu):
    def too_old(code):
        raise RuntimeError("CUDA says CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222)")

    gpu((9, 0), too_old)
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in InCuda().why_not_on(torch.device("cuda", 0))[0]


def test_a_kernel_that_does_not_compile_shows_the_compilers_words():
    with pytest.raises(RuntimeError, match=r"scan.cu does not compile for sm_90(?s:.)*identifier .G. is undefined"):
        compiler.compile("scan", (), 90)


def test_triton_takes_over_where_cuda_cannot_be_compiled(monkeypatch):
    request = KernelRequest(torch.device("cuda"), torch.bfloat16, 32, 8, 128, 1, 1, Rule(k=9))
    kernels, slower = served_by(request)
    assert kernels.language == "CUDA C++" and slower == []
    kernels, slower = served_by(replace(request, rule=Rule(share=0.1, critical=0.05, vote_share=0.5, vote_discount=21)))
    assert kernels.language == "Triton" and slower == ["discounts of more than 20 together are told apart in Triton"]
    monkeypatch.setattr(compiler, "why_not", lambda: "it is not installed")
    kernels, slower = served_by(request)
    assert kernels.language == "Triton" and slower == ["it is not installed"]
