"""NaN in, NaN out: the kernels, interpreted and emulated on a CPU, break as their reference does."""

import shutil

import pytest
import torch

from hashattn.ops.decode import encode_reference, reference
from tests.ops.decode.broken import RULES, TIERS, breaks_as_the_reference_does
from tests.ops.decode.emulator.run import emulate
from tests.ops.decode.encoding import given, twin

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_on_a_gpu.py", allow_module_level=True)

from hashattn import AsymmetricHash, SimHash
from hashattn.ops.decode.triton.decode import decode
from hashattn.ops.decode.triton.encode import encode

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
    breaks_as_the_reference_does(decode, rule, dtype=torch.float32)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_in_cuda(emulated, rule):
    breaks_as_the_reference_does(emulated, rule, dtype=torch.bfloat16)
    for scale in (torch.nan, torch.inf, -torch.inf):
        breaks_as_the_reference_does(emulated, rule, dtype=torch.bfloat16, scale=scale)


def test_a_scale_that_is_not_finite_in_triton():
    breaks_as_the_reference_does(decode, RULES[0], dtype=torch.float32, scale=torch.nan)


def test_the_check_sees_zeros_where_nan_belongs():
    def zeros_for_nan(x):
        found = reference(x)
        return found._replace(out=found.out.nan_to_num(nan=0.0))

    breaks_as_the_reference_does(reference, RULES[0], dtype=torch.float32)
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
    x = given(encoder)
    x.q[0, 2, 1], x.k[1, 1, 2] = value, value
    x.q[1, 3, 0, 5], x.k[0, 0, 1, 7] = value, value
    other = twin(x)
    expected, found = encode_reference.encode(other), encode(x)
    assert all(torch.equal(found[at], expected[at]) for at in [(0, 2, 1), (1, 3, 0)])
    codes, exact = x.stored.codes, other.stored.codes
    assert torch.equal(codes[1, 1, 22], exact[1, 1, 22]) and torch.equal(codes[0, 0, 21], exact[0, 0, 21])
