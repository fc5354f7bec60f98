"""Dense steps split over the keys, interpreted on a CPU or compiled on a GPU, against their reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops import dense
from tests.structured import seeds

split = pytest.importorskip("hashattn.ops.dense.triton", exc_type=ImportError)

COMPILED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
DEVICES = [pytest.param("cpu", marks=COMPILED), pytest.param("cuda", marks=pytest.mark.gpu)]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SHAPES = [  # batch, kv_heads, group, tokens, dim, room, filled, starts
    (1, 2, 4, 1, 64, 300, 300, (0,)),
    (2, 3, 3, 1, 128, 257, 130, (0, 129)),
    (2, 1, 1, 4, 96, 140, 77, (5, 60)),
    (3, 2, 8, 6, 64, 96, 96, (0, 1, 95)),
    (1, 1, 16, 8, 64, 70, 40, (0,)),  # more rows than a program's
    (1, 2, 2, 1, 256, 90, 1, (0,)),
]


def made(seed, batch, kv_heads, group, tokens, dim, room, filled, starts, dtype=torch.float32, device="cpu"):
    drawn = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=drawn).to(device, dtype)

    keys, values = random(batch, kv_heads, room, dim), random(batch, kv_heads, room, dim)
    length = torch.tensor([filled], dtype=torch.int32, device=device)
    begin = torch.tensor(starts, dtype=torch.int32, device=device)
    return random(batch, kv_heads * group, tokens, dim), keys, values, begin, length


def poisoned(keys, values, length):
    """The same with NaN beyond what is filled."""
    keys, values = keys.clone(), values.clone()
    keys[:, :, int(length) :], values[:, :, int(length) :] = torch.nan, torch.nan
    return keys, values


def check(q, keys, values, starts, length, scale=0.3):
    double = [x.double() for x in (q, keys, values)]
    expected = dense.reference.attend(*double, starts, length, scale)
    out = split.attend(q, *poisoned(keys, values, length), starts, length, scale)
    assert out.dtype == q.dtype
    largest = scale * double[0].norm(dim=-1).max() * double[1].norm(dim=-1).max()  # no logit is
    allowed = (4 * EPS[q.dtype] + largest * EPS[torch.float32]) * double[2].abs().max()  # of weighted means of values
    assert float((out.double() - expected).abs().max()) <= allowed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_attends_as_the_reference_does(shape, dtype, device):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    check(*made(1, *shape, dtype=dtype, device=device))


@COMPILED
@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(1, 150), st.integers(1, 5), st.integers(0, 160))
def test_any_length(seed, filled, tokens, start):
    check(*made(seed % 1000, 1, 1, 2, tokens, 64, 160, filled, (min(start, filled),)))


@pytest.mark.parametrize("device", DEVICES)
def test_beyond_the_room_it_is_nan_and_nothing_is_written(device):
    q, keys, values, starts, length = made(3, 2, 2, 2, 1, 64, 40, 38, (0, 3), device=device)
    both = [(keys.clone(), values.clone(), length.clone()) for _ in range(2)]
    k, v = torch.randn(2, 2, 3, 64, device=device), torch.randn(2, 2, 3, 64, device=device)
    split.append(k, v, *both[0])
    dense.reference.append(k, v, *both[1])
    for found, expected in zip(*both, strict=True):
        assert torch.equal(found, expected)
    assert split.attend(q, *both[0][:2], starts, both[0][2], 1.0).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_is_passed_on(device):
    q, keys, values, starts, length = made(4, 2, 1, 2, 1, 64, 150, 140, (0, 20), device=device)
    keys[1, 0, 60], values[0, 0, 19] = torch.nan, torch.inf
    out = split.attend(q, keys, values, starts, length, 1.0)
    assert out[1].isnan().all() and out[0].isinf().any()
    keys[1, 0, 60], values[0, 0, 19] = 0, 0
    keys[1, 0, 19] = torch.nan  # which the row does not see
    assert split.attend(q, keys, values, starts, length, 1.0).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_a_cache_and_long_ones(dtype):
    q, keys, values, *_ = made(5, 2, 4, 4, 1, 128, 70_000, 0, (0, 0), dtype=dtype, device="cuda")
    k, v = keys[:, :, :65_537], values[:, :, :65_537]
    assert dense.splits(q, k)
    out = dense.attend_all(q, k, v, 0.1)
    grouped = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), scale=0.1, enable_gqa=True
    )
    assert float((out.double() - grouped).abs().max()) <= 4 * EPS[dtype] * float(v.abs().max())


def test_programs_fill_their_rounds():
    cpu = torch.device("cpu")  # four multiprocessors, eight programs at a time
    assert [split.splits_of(n, 99, cpu) for n in (1, 2, 3, 8)] == [8, 4, 2, 1]
    assert split.splits_of(1, 3, cpu) == 3
    assert split.splits_of(9, 99, cpu) in range(1, 9)
    assert split.splits_of(16, 99, cpu) == 1


@pytest.mark.gpu
def test_a_traced_step_takes_it_as_one_node():
    dense.register()
    q, keys, values, starts, length = made(6, 1, 2, 2, 1, 64, 64, 60, (0,), device="cuda")
    k = torch.randn(1, 2, 1, 64, device="cuda")

    @torch.compile(fullgraph=True)
    def step(q, k, length):
        dense.append(k, k, keys, values, length)
        return dense.attend(q, keys, values, starts, length, 1.0)

    out = step(q, k, length)
    assert int(length) == 61 and torch.equal(keys[:, :, 60:61], k)
    expected = dense.reference.attend(q, keys, values, starts, length, 1.0)
    assert torch.allclose(out, expected, atol=1e-5)
