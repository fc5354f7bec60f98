"""Encoding and appending compiled, on a GPU, against plain PyTorch. Run with pytest -m gpu."""

import importlib

import pytest
import torch

from hashattn import AsymmetricHash, SimHash
from hashattn.ops.decode import Newest, Stored
from tests.ops.decode.encoding import (
    MANY,
    SMALL,
    encodes,
    encodes_many,
    encodes_placed,
    encoding,
    randomised,
    same_bits,
)

pytestmark = pytest.mark.gpu
LLAMA = {"dim": 128, "kv_heads": 8, "group": 4, "dtype": torch.bfloat16, "device": "cuda"}


@pytest.fixture(scope="module", params=["cuda", "triton"], ids=["CUDA C++", "Triton"])
def encode(request):
    return importlib.import_module(f"hashattn.ops.decode.{request.param}.encode").encode


@pytest.mark.parametrize(("encoder", "shape"), SMALL)
def test_newest_queries_and_keys_are_encoded_and_appended(encode, encoder, shape):
    encodes(encode, encoder, **shape, device="cuda")
    encodes(encode, encoder, **shape, device="cuda", norms=True)


@pytest.mark.parametrize(("encoder", "shape"), SMALL[1:9:3])
def test_they_are_appended_where_the_host_says(encode, encoder, shape):
    encodes(encode, encoder, **shape, norms=True, known=True, device="cuda")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("language", ["cuda", "triton"])
@pytest.mark.parametrize(("encoder", "shape"), SMALL)
def test_queries_are_encoded_and_new_keys_that_are_in_place(encoder, shape, language, new):
    encode = importlib.import_module(f"hashattn.ops.decode.{language}.encode").encode_placed
    encodes_placed(encode, encoder, **shape, device="cuda", new=new, norms=True)


@pytest.mark.parametrize("language", ["cuda", "triton"])
@pytest.mark.parametrize(("encoder", "shape"), [*MANY, (SimHash(64), {"dim": 128, "keys": 65_536, "heads": 8})])
def test_many_keys_are_encoded_at_once(encoder, shape, language):
    encode = importlib.import_module(f"hashattn.ops.decode.{language}.encode_many").encode_many
    for dtype in (torch.bfloat16, torch.float32):
        encodes_many(encode, encoder, **{**shape, "dtype": dtype}, device="cuda")


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 1), (8, 1), (1, 16), (8, 16)])
@pytest.mark.parametrize(
    "encoder",
    [
        SimHash(64),
        AsymmetricHash(64),
        AsymmetricHash(128, query_bits=2),
        AsymmetricHash(256, query_hidden=(128, 128), key_hidden=(128, 128)),
        AsymmetricHash(64, query_hidden=(512,)),
        AsymmetricHash(256, query_hidden=(512, 512), key_hidden=(300, 17)),
    ],
    ids=str,
)
def test_a_large_model(encode, encoder, batch, tokens):
    encodes(encode, encoder, batch=batch, tokens=tokens, **LLAMA)
    encodes(encode, encoder, batch=batch, tokens=tokens, **LLAMA, norms=True)


@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(64)], ids=["linear", "MLP"])
def test_one_captured_launch_serves_many_steps(encode, encoder):
    encoder = randomised(encoder, 128, "cuda")
    maps = encoder.maps(128, torch.device("cuda"))
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    centre, length = torch.randn(1, 8, 128, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.int32)
    keys, values = (torch.zeros(1, 8, 100, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    codes = torch.zeros(1, 8, 100, 1, device="cuda", dtype=torch.int64)
    x = encoding(Newest(q, k, v, centre, maps, 1, Stored(keys, values, codes, length)))
    encode(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = encode(x)
    new = torch.randn(100, 1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    length.zero_()
    for step in new:
        q.normal_()
        k.copy_(step)
        v.copy_(-step)
        graph.replay()
        same_bits(query, q, maps[0], 1)
    stored = new.transpose(0, 3)[0]
    assert int(length) == 100
    assert torch.equal(keys, stored) and torch.equal(values, -stored)
    same_bits(codes.unsqueeze(3), stored.float() - centre.unsqueeze(2), maps[1], 1)


def test_bits_do_not_depend_on_which_program_comes_last():
    from hashattn.ops.decode.cuda.encode import encode

    g, (q_heads, kv_heads, room, steps) = torch.Generator("cuda").manual_seed(5), (32, 8, 1000, 200)
    encoder = randomised(AsymmetricHash(128, query_bits=2, key_hidden=(256, 256)), 128, "cuda")
    maps = encoder.maps(128, torch.device("cuda"))
    q = torch.randn(1, q_heads, 1, 128, device="cuda", generator=g).half()
    k = torch.randn(1, kv_heads, 1, 128, device="cuda", generator=g).half()
    centre, length = torch.zeros(1, kv_heads, 128, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.int32)
    keys, values = (torch.zeros(1, kv_heads, room, 128, device="cuda").half() for _ in range(2))
    codes = torch.zeros(1, kv_heads, room, 2, device="cuda", dtype=torch.int64)
    x = encoding(Newest(q, k, k, centre, maps, 2, Stored(keys, values, codes, length)))
    queries = torch.stack([encode(x) for _ in range(steps)])
    assert int(length) == steps
    assert torch.equal(queries, queries[:1].expand_as(queries))
    assert torch.equal(codes[:, :, :steps], codes[:, :, :1].expand(-1, -1, steps, -1))
    assert not codes[:, :, steps:].any()
