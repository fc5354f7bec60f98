"""Numbers beyond 32 bits, memory beyond 2^31 elements, views that begin anywhere: kernels interpreted and emulated."""

import shutil
from dataclasses import replace

import pytest
import torch

from hashattn.ops.decode import Rule, device, reference, why_not
from hashattn.ops.decode.cuda.step import launches
from hashattn.ops.decode.device import on_its_device
from hashattn.ops.decode.sizes import MOST_COLUMNS, Sizes, grid
from tests.ops.decode.cases import BEYOND, agrees, inputs, shifted
from tests.ops.decode.emulator.run import emulate

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_on_a_gpu.py", allow_module_level=True)

from hashattn.ops.decode import triton

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
SMALL = {"filled": 90, "room": 96, "group": 2}


@pytest.fixture(params=["cuda", "triton"])
def decode(request, monkeypatch):
    if request.param == "triton":
        return triton.decode
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    return emulate(monkeypatch)


@pytest.mark.parametrize("rule", BEYOND, ids=str)
def test_numbers_beyond_32_bits_mean_everything(decode, rule):
    agrees(decode, inputs(1, **SMALL), rule, hints=(None,))


@pytest.mark.parametrize("radius", [2**31 - 1, 2**31 + 3, 2**40])
def test_a_radius_beyond_32_bits_is_beyond_every_distance(decode, radius):
    x, rule = inputs(2, **SMALL), Rule(k=40, radius=radius)
    bounds, workspace = x.state(rule)
    expected = reference(*x.all, replace(rule, radius=64), scale=0.1)[2]
    assert torch.equal(decode(*x.all, bounds, rule, workspace, scale=0.1)[2][..., :40], expected)


def test_a_rule_within_a_room_keeps_the_same_keys():
    assert Rule(k=5, sinks=3).within(100) == Rule(k=5, sinks=3)
    assert Rule(k=500, sinks=2**40, recents=101).within(100) == Rule(k=100, sinks=100, recents=100)
    assert Rule(k=512, chunks=64).within(100) == Rule(k=512, chunks=64)  # of which each keeps its share
    assert Rule(share=0.5, sinks=2**33).within(7) == Rule(share=0.5, sinks=7)


@pytest.mark.parametrize(("room", "code_room"), [(64, 320), (320, 64)])
@pytest.mark.parametrize("rule", [Rule(share=1.0), Rule(k=64, chunks=8)], ids=str)
def test_a_length_beyond_the_smaller_room_gives_nan_and_leaves_the_state_as_it_was(decode, room, code_room, rule):
    x = inputs(3, filled=64, room=320, group=2)
    x = replace(x, keys=x.keys[:, :, :room].contiguous(), values=x.values[:, :, :room].contiguous(),
                codes=x.codes[:, :, :code_room].contiguous())  # fmt: skip
    bounds, workspace = x.state(rule)
    expected = reference(*x.all, rule, scale=1.0)
    for length, spoilt in ((64, False), (200, True), (64, False)):
        x.length.fill_(length)
        out, _, ids = decode(*x.all, bounds, rule, workspace, scale=1.0)
        assert torch.equal(ids[..., : expected[2].shape[-1]], expected[2])
        assert out.isnan().all() if spoilt else (out - expected[0]).abs().max() < 1e-5
        assert not bounds[(rule.chunks or 1) :].any()


@pytest.mark.parametrize("rule", [Rule(k=30), Rule(k=30, shared=True), Rule(k=32, chunks=2)], ids=str)
def test_queries_may_be_any_view(emulated_steps, rule):
    decode, addresses = emulated_steps
    x = inputs(4, **SMALL, dtype=torch.bfloat16)
    bounds, workspace = x.state(rule)
    expected = decode(*x.all, bounds, rule, workspace, scale=0.1)
    transposed = x.q.transpose(2, 3).contiguous().transpose(2, 3)
    for q in (shifted(x.q), transposed, torch.stack([x.q, x.q], -1)[..., 0]):
        found = decode(*replace(x, q=q).all, bounds, rule, workspace, scale=0.1)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(address % 16 for address in addresses)


@pytest.fixture
def emulated_steps(monkeypatch):
    """decode, and where its kernels were told that queries, keys and values begin."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    from hashattn.ops.decode.cuda import compiler

    decode, addresses = emulate(monkeypatch), []
    launch = compiler.launch

    def watched(kernel, grid, threads, argument, **options):
        addresses.extend([argument.q, argument.keys, argument.values, argument.parts])
        launch(kernel, grid, threads, argument, **options)

    monkeypatch.setattr(compiler, "launch", watched)
    return decode, addresses


@pytest.mark.parametrize("name", ["keys", "values"])
def test_keys_that_begin_anywhere_are_refused(emulated_steps, name):
    decode, addresses = emulated_steps
    x, rule = inputs(4, **SMALL, dtype=torch.bfloat16), Rule(k=30)
    bounds, workspace = x.state(rule)
    for view in (shifted(getattr(x, name)), getattr(x, name).transpose(2, 3).contiguous().transpose(2, 3)):
        with pytest.raises(ValueError, match=f"{name} must be contiguous and begin at a multiple of 16 bytes"):
            decode(*replace(x, **{name: view}).all, bounds, rule, workspace, scale=1.0)
    assert not addresses


def test_the_second_head_may_lie_beyond_two_to_the_31_elements(decode, tmp_path):
    """In a file with holes, of which only what is written or read takes any memory."""
    x, room, rule = inputs(5, kv_heads=2, filled=90, room=96, group=2, dtype=torch.bfloat16), 2**25, Rule(k=40)
    numel = 2 * room * 64
    assert numel == 2**32
    held = {}
    for name in ("keys", "values"):
        path = tmp_path / name
        held[name] = torch.from_file(str(path), shared=True, size=numel, dtype=torch.bfloat16).view(1, 2, room, 64)
        path.unlink()
        held[name][:, :, :90] = getattr(x, name)[:, :, :90]
    bounds, workspace = x.state(rule)
    expected = decode(*x.all, bounds, rule, workspace, scale=0.1)
    far = replace(x, **held)
    found = decode(*far.all, *far.state(rule)[:1], rule, far.state(rule)[1], scale=0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_than_the_kernels_count_is_refused():
    small = {"batch": 1, "q_heads": 32, "kv_heads": 8, "tokens": 1, "head_dim": 128, "room": 64, "code_room": 64}
    small |= {"planes": 1, "words": 1, "rule": Rule(k=9)}
    Sizes(**small | {"batch": 65_535, "room": MOST_COLUMNS, "code_room": MOST_COLUMNS})
    with pytest.raises(ValueError, match="room for 268,435,457 columns, the kernels count up to 268,435,456"):
        Sizes(**small | {"room": MOST_COLUMNS + 1})
    with pytest.raises(ValueError, match="4,096 sequences of 16 queries are more than the 65,535"):
        Sizes(**small | {"batch": 4096, "tokens": 16})
    call = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 128, "group": 4, "words": 1, "planes": 1}
    assert why_not(**call, tokens=16, rule=Rule(k=9), batch=4095) is None
    assert "65,536" in str(why_not(**call, tokens=16, rule=Rule(k=9), batch=4096))
    assert why_not(**call, tokens=1, rule=Rule(k=2**24, chunks=2**20)) is None
    assert "k up to 16,777,216" in str(why_not(**call, tokens=1, rule=Rule(k=2**40, chunks=2**36)))


@pytest.mark.parametrize("rule", [Rule(k=1024), Rule(k=1024, shared=True), Rule(k=1024, chunks=64)], ids=str)
def test_rows_beyond_65535_fit_into_a_grid(rule):
    sizes = Sizes(4095, 128, 8, 16, 128, 4096, 4096, 1, 1, rule)
    assert sizes.rows > 65_535
    _, *others = grid(64, sizes.rows, sizes.batch)
    assert max(others) <= 65_535 and others[0] * others[1] == sizes.rows
    for one in launches(sizes, torch.bfloat16, True, True, 132):
        assert max(one.grid[1:]) <= 65_535


def test_amd_gpus_are_told_from_nvidias(monkeypatch):
    call = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 128, "group": 4, "words": 1, "planes": 1}
    assert why_not(**call, tokens=1, rule=Rule(k=9)) is None
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    assert "an AMD GPU here (ROCm 7.1.0)" in str(why_not(**call, tokens=1, rule=Rule(k=9)))


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on the second GPU."""

    @property
    def is_cuda(self):
        return True

    @property
    def device(self):
        return torch.device("cuda", 1)


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    entered = []

    class Recorded:
        def __init__(self, where):
            entered.append(where)

        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    monkeypatch.setattr(device.torch.cuda, "device", Recorded)
    there = torch.zeros(1).as_subclass(Elsewhere)
    assert on_its_device(lambda x, y: entered.append("launch") or y)(there, 7) == 7
    assert entered == [torch.device("cuda", 1), "in", "launch", "out"]
    entered.clear()
    assert on_its_device(lambda x: 3)(torch.zeros(1)) == 3 and not entered
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    with pytest.raises(RuntimeError, match="an AMD GPU here"):
        on_its_device(lambda x: 3)(there)
