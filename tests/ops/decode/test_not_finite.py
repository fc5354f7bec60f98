"""NaN in, NaN out: the kernels, interpreted and emulated on a CPU, break as their reference does."""

import shutil

import pytest
import torch

from hashattn.ops.decode import append_reference, reference
from tests.ops.decode.broken import RULES, TIERS, breaks_as_the_reference_does
from tests.ops.decode.emulator.run import emulate
from tests.ops.decode.test_encode_in_cuda import given

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_on_a_gpu.py", allow_module_level=True)

from hashattn import AsymmetricHash, SimHash
from hashattn.ops.decode.encode import encode
from hashattn.ops.decode.triton import decode, decode_tiers

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow|All-NaN slice) encountered:RuntimeWarning"
)


@pytest.fixture
def emulated(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    return emulate(monkeypatch)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_in_triton(rule):
    breaks_as_the_reference_does(decode, rule, dtype=torch.float32)


@pytest.mark.parametrize("rule", TIERS, ids=str)
def test_with_tiers(rule):
    breaks_as_the_reference_does(decode_tiers, rule, dtype=torch.float32)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_in_cuda(emulated, rule):
    breaks_as_the_reference_does(emulated, rule, dtype=torch.bfloat16)
    for scale in (torch.nan, torch.inf, -torch.inf):
        breaks_as_the_reference_does(emulated, rule, dtype=torch.bfloat16, scale=scale)


def test_a_scale_that_is_not_finite_in_triton():
    breaks_as_the_reference_does(decode, RULES[0], dtype=torch.float32, scale=torch.nan)


def test_the_check_sees_zeros_where_nan_belongs():
    def zeros_for_nan(*call, **options):
        out, *rest = reference(*call[:7], call[8], **options)
        return out.nan_to_num(nan=0.0), *rest

    breaks_as_the_reference_does(lambda *c, **o: reference(*c[:7], c[8], **o), RULES[0], dtype=torch.float32)
    with pytest.raises(AssertionError):
        breaks_as_the_reference_does(zeros_for_nan, RULES[0], dtype=torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, 1e38, 1e-35])
@pytest.mark.parametrize(
    "encoder",
    [
        SimHash(64, query_bits=2), AsymmetricHash(100, query_hidden=(40, 24), query_bits=2),
        AsymmetricHash(64, query_hidden=(24,), key_hidden=(24, 9)),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_finite_gives_the_references_bits(encoder, value):
    (q, k, *rest), _ = given(encoder)
    q[0, 2, 1], k[1, 1, 2] = value, value
    q[1, 3, 0, 5], k[0, 0, 1, 7] = value, value
    *maps_and_held, arrived, workspace = rest
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in maps_and_held]
    expected = append_reference.encode(q, k, *copies)
    found = encode(q, k, *maps_and_held, arrived, workspace)
    assert all(torch.equal(found[at], expected[at]) for at in [(0, 2, 1), (1, 3, 0)])
    codes, exact = maps_and_held[-2], copies[-2]
    assert torch.equal(codes[1, 1, 22], exact[1, 1, 22]) and torch.equal(codes[0, 0, 21], exact[0, 0, 21])
