"""Numbers beyond 32 bits, memory beyond 2^31 elements, views that begin anywhere: kernels interpreted and emulated."""

import shutil
from dataclasses import replace

import pytest
import torch

from hashattn.ops.decode import KernelRequest, Rule, device, reference, why_not
from hashattn.ops.decode.cuda.launches import launches
from hashattn.ops.decode.device import check_nvidia, on
from hashattn.ops.decode.sizes import MOST_COLUMNS, Sizes, grid
from tests.ops.decode.cases import BEYOND, agrees, inputs, ready, same, shifted, stored
from tests.ops.decode.emulator.run import emulate

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_on_a_gpu.py", allow_module_level=True)

from hashattn.ops.decode.triton.decode import decode as in_triton

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
SMALL = {"filled": 90, "room": 96, "group": 2}
REQUEST = KernelRequest(torch.device("cuda"), torch.bfloat16, 32, 8, 128, 1, 1, Rule(k=9))


@pytest.fixture(params=["cuda", "triton"])
def decode(request, monkeypatch):
    if request.param == "triton":
        return in_triton
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    return emulate(monkeypatch)


@pytest.mark.parametrize("rule", BEYOND, ids=str)
def test_numbers_beyond_32_bits_mean_everything(decode, rule):
    agrees(decode, inputs(1, **SMALL), rule, hints=(None,))


@pytest.mark.parametrize("radius", [2**31 - 1, 2**31 + 3, 2**40])
def test_a_radius_beyond_32_bits_is_beyond_every_distance(decode, radius):
    x, rule = inputs(2, **SMALL), Rule(k=40, radius=radius)
    expected = reference(replace(x, rule=replace(rule, radius=64))).ids
    assert torch.equal(decode(ready(x, rule)).ids[..., :40], expected)


def test_a_rule_within_a_room_keeps_the_same_keys():
    assert Rule(k=5, sinks=3).within(100) == Rule(k=5, sinks=3)
    assert Rule(k=500, sinks=2**40, recents=101).within(100) == Rule(k=100, sinks=100, recents=100)
    assert Rule(k=512, chunks=64).within(100) == Rule(k=512, chunks=64)  # of which each keeps its share
    assert Rule(share=0.5, sinks=2**33).within(7) == Rule(share=0.5, sinks=7)


@pytest.mark.parametrize(("room", "code_room"), [(64, 320), (320, 64)])
@pytest.mark.parametrize("rule", [Rule(share=1.0), Rule(k=64, chunks=8)], ids=str)
def test_a_length_beyond_the_smaller_room_gives_nan_and_leaves_the_state_as_it_was(decode, room, code_room, rule):
    x = inputs(3, filled=64, room=320, group=2)
    held = {name: getattr(x.stored, name)[:, :, :room].contiguous() for name in ("keys", "values")}
    x = ready(stored(x, **held, codes=x.stored.codes[:, :, :code_room].contiguous()), rule)
    expected = reference(x)
    for length, spoilt in ((64, False), (200, True), (64, False)):
        x.stored.length.fill_(length)
        out, _, ids = decode(x)[:3]
        assert torch.equal(ids[..., : expected.ids.shape[-1]], expected.ids)
        assert out.isnan().all() if spoilt else (out - expected.out).abs().max() < 1e-5
        assert not x.bounds[(rule.chunks or 1) :].any()


@pytest.mark.parametrize("rule", [Rule(k=30), Rule(k=30, shared=True), Rule(k=32, chunks=2)], ids=str)
def test_queries_may_be_any_view(emulated_steps, rule):
    decode, addresses = emulated_steps
    x = ready(inputs(4, **SMALL, dtype=torch.bfloat16), rule)
    expected = decode(x)
    transposed = x.q.transpose(2, 3).contiguous().transpose(2, 3)
    for q in (shifted(x.q), transposed, torch.stack([x.q, x.q], -1)[..., 0]):
        assert same(decode(replace(x, q=q)), expected)
    assert not any(address % 16 for address in addresses)


@pytest.fixture
def emulated_steps(monkeypatch):
    """decode, and where its kernels were told that queries, keys and values begin."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    from hashattn.ops.decode.cuda import compiler

    decode, addresses = emulate(monkeypatch), []

    class Watched(compiler.Launcher):
        def __call__(self, stream):
            addresses.extend([self.argument.q, self.argument.keys, self.argument.values, self.argument.parts])
            super().__call__(stream)

    monkeypatch.setattr(compiler, "Launcher", Watched)
    return decode, addresses


@pytest.mark.parametrize("name", ["keys", "values"])
def test_keys_that_begin_anywhere_are_refused(emulated_steps, name):
    decode, addresses = emulated_steps
    x = ready(inputs(4, **SMALL, dtype=torch.bfloat16), Rule(k=30))
    held = getattr(x.stored, name)
    for view in (shifted(held), held.transpose(2, 3).contiguous().transpose(2, 3)):
        with pytest.raises(ValueError, match=f"{name} must be contiguous and begin at a multiple of 16 bytes"):
            decode(stored(x, **{name: view}))
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
        held[name][:, :, :90] = getattr(x.stored, name)[:, :, :90]
    assert same(decode(ready(stored(x, **held), rule)), decode(ready(x, rule)))


def test_more_than_the_kernels_count_is_refused():
    small = {"batch": 1, "q_heads": 32, "kv_heads": 8, "tokens": 1, "head_dim": 128, "room": 64, "code_room": 64}
    small |= {"planes": 1, "words": 1, "rule": Rule(k=9)}
    Sizes(**small | {"batch": 65_535, "room": MOST_COLUMNS, "code_room": MOST_COLUMNS})
    with pytest.raises(ValueError, match="room for 268,435,457 columns, the kernels count up to 268,435,456"):
        Sizes(**small | {"room": MOST_COLUMNS + 1})
    with pytest.raises(ValueError, match="4,096 sequences of 16 queries are more than the 65,535"):
        Sizes(**small | {"batch": 4096, "tokens": 16})
    many = replace(REQUEST, tokens=16, batch=4095)
    assert why_not(many) == []
    (reason,) = why_not(replace(many, batch=4096))
    assert "4,096 sequences of 16 queries are more than the 65,535" in reason
    (reason,) = why_not(replace(REQUEST, room=MOST_COLUMNS + 1))
    assert "room for 268,435,457 columns" in reason
    assert why_not(replace(REQUEST, rule=Rule(k=2**24, chunks=2**20))) == []
    assert any("k up to 16,777,216" in reason for reason in why_not(replace(REQUEST, rule=Rule(k=2**40, chunks=2**36))))


@pytest.mark.parametrize("rule", [Rule(k=1024), Rule(k=1024, shared=True), Rule(k=1024, chunks=64)], ids=str)
def test_rows_beyond_65535_fit_into_a_grid(rule):
    sizes = Sizes(4095, 128, 8, 16, 128, 4096, 4096, 1, 1, rule)
    assert sizes.rows > 65_535
    _, *others = grid(64, sizes.rows, sizes.batch)
    assert max(others) <= 65_535 and others[0] * others[1] == sizes.rows
    for one in launches(sizes, torch.bfloat16, True, True, 132):
        assert max(one.grid[1:]) <= 65_535


def test_amd_gpus_are_told_from_nvidias(monkeypatch):
    assert why_not(REQUEST) == []
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    (reason,) = why_not(REQUEST)
    assert "an AMD GPU here (ROCm 7.1.0)" in reason


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    entered, there = [], torch.device("cuda", 1)

    class Recorded:
        def __init__(self, where):
            entered.append(where)

        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    monkeypatch.setattr(device.torch.cuda, "device", Recorded)
    monkeypatch.setattr(device.torch.cuda, "current_device", lambda: 0)
    with on(there):
        entered.append("launch")
    assert entered == [there, "in", "launch", "out"]
    entered.clear()
    with on(torch.device("cuda", 0)), on(torch.device("cpu")):
        assert not entered
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    check_nvidia(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="an AMD GPU here"):
        check_nvidia(there)
