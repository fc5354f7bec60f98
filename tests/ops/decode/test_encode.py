"""Encoding and appending in the step's kernels under Triton's interpreter, on the CPU, against plain PyTorch."""

import pytest
import torch

from hashattn import AsymmetricHash, SimHash
from hashattn.ops.decode import Stored, why_not_encode
from tests.ops.decode.cases import inputs
from tests.ops.decode.encoding import MANY, SMALL, encodes, encodes_many, encodes_placed

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_encode_on_a_gpu.py", allow_module_level=True)

from hashattn.ops.decode.estimate import NORMS
from hashattn.ops.decode.triton.append import append
from hashattn.ops.decode.triton.encode import encode, encode_placed
from hashattn.ops.decode.triton.encode_many import encode_many


@pytest.mark.parametrize(("encoder", "shape"), SMALL)
def test_newest_queries_and_keys_are_encoded_and_appended(encoder, shape):
    encodes(encode, encoder, **shape)


@pytest.mark.parametrize(("encoder", "shape"), [SMALL[1], SMALL[2], SMALL[6]])
def test_so_are_norms(encoder, shape):
    encodes(encode, encoder, **shape, norms=True)
    encodes(encode, encoder, **shape, norms=True, dtype=torch.bfloat16, kv_heads=1)


@pytest.mark.parametrize(("encoder", "shape"), SMALL[1:9:3])
def test_they_are_appended_where_the_host_says(encoder, shape):
    encodes(encode, encoder, **shape, norms=True, known=True)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(("encoder", "shape"), SMALL)
def test_queries_are_encoded_and_new_keys_that_are_in_place(encoder, shape, new):
    encodes_placed(encode_placed, encoder, **shape, new=new, norms=True)


@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(64, query_hidden=(20, 20))], ids=["linear", "MLP"])
@pytest.mark.parametrize(("filled", "room", "code_room"), [(49, 50, 64), (50, 64, 50), (70, 50, 64)])
def test_what_does_not_fit_is_dropped_and_counted(encoder, filled, room, code_room):
    encodes(encode, encoder, dim=64, tokens=3, filled=filled, room=room, code_room=code_room, norms=True)


@pytest.mark.parametrize(("encoder", "shape"), MANY)
def test_many_keys_are_encoded_at_once(encoder, shape):
    encodes_many(encode_many, encoder, **shape)


def test_append_drops_and_counts_what_does_not_fit():
    x = inputs(6, batch=2, kv_heads=3, filled=63, room=64, dim=96, words=2)
    k, v, codes = torch.ones(2, 3, 3, 96), torch.full((2, 3, 3, 96), 2.0), torch.full((2, 3, 3, 2), 3)
    new_norms, empty = torch.full((2, 3, 3, 1), 4, dtype=NORMS), torch.zeros(2, 3, 64, 1, dtype=NORMS)
    before, length = (x.stored.keys, x.stored.values, x.stored.codes, empty), x.stored.length.clone()
    *held, norms = (part.clone() for part in before)
    arrived = torch.zeros(1, dtype=torch.int32)
    append(k, v, codes, new_norms, Stored(*held, length, norms), arrived)
    assert int(length) == 66
    for stored, old, value in zip((*held, norms), before, (1, 2, 3, 4), strict=True):
        assert (stored[:, :, 63] == value).all()
        assert torch.equal(stored[:, :, :63], old[:, :, :63])
    append(k, v, codes, None, Stored(*held, length.fill_(2)), arrived)
    assert int(arrived) == 0 and int(length) == 5 and (held[0][:, :, 2:5] == 1).all()
    assert not norms[:, :, :63].any()


@pytest.mark.parametrize(
    ("widths", "reason"),
    [
        (((), ()), None),
        (((256, 256), (128,)), None),
        (((512, 512), (512, 512)), None),
        (None, "signs of maps that all heads share"),
        (((), (8, 8, 8)), "up to 2 hidden layers, not 3"),
        (((513,), ()), "up to 512 wide, not 513"),
    ],
)
def test_what_is_encoded_in_pytorch_is_named(widths, reason):
    found = why_not_encode(widths)
    assert found == [] if reason is None else len(found) == 1 and reason in found[0]
