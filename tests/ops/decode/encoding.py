"""Encoders with random weights, and the check of what is encoded and appended, that tests on CPU and GPU share."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hashattn import AsymmetricHash, Encoder, SimHash, SymmetricHash
from hashattn.encoders.learned import LearnedHash
from hashattn.ops.decode import Map, Newest, Placed, Rule, Sizes, Stored
from hashattn.ops.decode.sizes import counters
from hashattn.ops.hamming import unpack_bits
from tests.ops.decode.cases import poisoned
from tests.structured import generator

SMALL: list[tuple[Encoder, dict[str, Any]]] = [
    (SimHash(64), {"dim": 64}),
    (SimHash(100, query_bits=2), {"dim": 96, "tokens": 3}),
    (SimHash(256), {"dim": 128, "batch": 5, "group": 7}),
    (SymmetricHash(128, query_bits=4, heads=1), {"dim": 96, "tokens": 2}),
    (AsymmetricHash(64, query_hidden=(40, 24)), {"dim": 128}),
    (AsymmetricHash(128, query_hidden=(24, 40)), {"dim": 64, "batch": 5, "group": 7}),
    (AsymmetricHash(100, query_hidden=(40,), query_bits=2), {"dim": 64, "tokens": 3}),
    (AsymmetricHash(128, query_hidden=(), key_hidden=(24,)), {"dim": 96}),
    (AsymmetricHash(8, query_hidden=(1, 70), key_hidden=(17, 1)), {"dim": 64, "group": 1, "tokens": 3}),
    (AsymmetricHash(200, query_hidden=(33,), query_bits=2), {"dim": 64, "batch": 1}),
    (AsymmetricHash(100, query_hidden=(24,), key_hidden=(40, 20), query_bits=2), {"dim": 96, "tokens": 3, "batch": 3}),
]


def randomised(encoder: Encoder, dim: int, device: str = "cpu", seed: int = 0) -> Encoder:
    """A copy with weights as large as trained ones could be, biases included: an MLP starts at zero."""
    encoder = copy.deepcopy(encoder)
    if isinstance(encoder, LearnedHash):
        encoder.build(dim)
        for p in encoder.parameters():
            p.data = torch.randn(p.shape, generator=generator(seed)) * (p.shape[-2] ** -0.5 if p.shape[-2] > 1 else 0.2)
        encoder.to(device)
    return encoder


def encodes(
    encode: Any, encoder: Encoder, *, dim: int, batch: int = 2, kv_heads: int = 2, group: int = 3, tokens: int = 1,
    filled: int = 40, room: int = 50, code_room: int = 64, dtype: torch.dtype = torch.float32, device: str = "cpu",
    seed: int = 0, norms: bool = False, known: bool = False,
) -> None:  # fmt: skip
    """Queries and keys have the encoder's bits, all that keys need is appended, and nothing else is written.

    known: the host says how many columns are filled, and the length does not.
    """
    g = generator(seed)
    encoder = randomised(encoder, dim, device, seed)
    maps, words = encoder.maps(dim, torch.device(device)), -(-encoder.bits // 64)
    q = (3 * torch.randn(batch, kv_heads * group, tokens, dim, generator=g)).to(device, dtype)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, generator=g).to(device, dtype) for _ in range(2))
    centre = torch.randn(batch, kv_heads, dim, generator=g).to(device)
    held = [
        *(torch.randn(batch, kv_heads, room, dim, generator=g).to(device, dtype) for _ in range(2)),
        torch.randint(-(2**63), 2**63 - 1, (batch, kv_heads, code_room, words), generator=g).to(device),
    ]
    length = torch.tensor([7 if known else filled], dtype=torch.int32, device=device)
    into = Stored(*held, length)
    if norms:
        held += [torch.randn(batch, kv_heads, code_room, 1, generator=g).to(device, torch.bfloat16)]
        into = Stored(*held[:3], length, held[3])
    before = [x.clone() for x in held]
    newest = encoding(Newest(q, k, v, centre, maps, encoder.query_bits, into))
    with poisoned():
        query = encode(newest, filled) if known else encode(newest)
    assert int(length) == filled + tokens
    assert not newest.arrived.any()
    assert query.shape == (batch, kv_heads * group, tokens, encoder.query_bits, words)
    same_bits(query, q, maps[0], encoder.query_bits)
    end = max(filled, min(filled + tokens, room, code_room))
    new = (x[:, :, : end - filled] for x in (k, v))
    assert all(torch.equal(x[:, :, filled:end], y) for x, y in zip(held, new, strict=False))
    if end > filled:
        centred = (k.float() - centre.unsqueeze(2))[:, :, : end - filled]
        same_bits(held[2][:, :, filled:end].unsqueeze(3), centred, maps[1], 1)
        for stored in held[3:]:
            same_norms(stored[:, :, filled:end], k[:, :, : end - filled], centre)
    for x, old in zip(held, before, strict=True):
        assert torch.equal(x[:, :, :filled], old[:, :, :filled])
        assert torch.equal(x[:, :, end:], old[:, :, end:])


def encodes_placed(
    encode: Any, encoder: Encoder, *, dim: int, batch: int = 2, kv_heads: int = 2, group: int = 3, tokens: int = 1,
    first: int = 40, room: int = 50, code_room: int = 64, dtype: torch.dtype = torch.float32, device: str = "cpu",
    seed: int = 0, norms: bool = False, new: bool = True,
) -> None:  # fmt: skip
    """Queries have the encoder's bits, and so have keys in place if they are new; nothing else is written."""
    g = generator(seed)
    encoder = randomised(encoder, dim, device, seed)
    maps, words = encoder.maps(dim, torch.device(device)), -(-encoder.bits // 64)
    q = (3 * torch.randn(batch, kv_heads * group, tokens, dim, generator=g)).to(device, dtype)
    centre = torch.randn(batch, kv_heads, dim, generator=g).to(device)
    keys, values = (torch.full((batch, kv_heads, room, dim), torch.nan).to(device, dtype) for _ in range(2))
    k = keys[:, :, first : first + tokens] = torch.randn(batch, kv_heads, tokens, dim, generator=g).to(device, dtype)
    codes = torch.randint(-(2**63), 2**63 - 1, (batch, kv_heads, code_room, words), generator=g).to(device)
    held = [codes, torch.randn(batch, kv_heads, code_room, 1, generator=g).to(device, torch.bfloat16)]
    before = [x.clone() for x in held]
    length = torch.tensor([7], dtype=torch.int32, device=device)
    stored = Stored(keys, values, codes, length, held[1] if norms else None)
    written = torch.full((batch, kv_heads * group, tokens, encoder.query_bits, words), -1, device=device)
    placed = encoding(Placed(q, centre, maps, encoder.query_bits, stored, written))
    with poisoned():
        query = encode(placed, q, first, new)
    assert int(length) == first + tokens
    assert not placed.arrived.any()
    assert query.shape == (batch, kv_heads * group, tokens, encoder.query_bits, words)
    same_bits(query, q, maps[0], encoder.query_bits)
    if new:
        here = slice(first, first + tokens)
        same_bits(codes[:, :, here].unsqueeze(3), k.float() - centre.unsqueeze(2), maps[1], 1)
        if norms:
            same_norms(held[1][:, :, here], k, centre)
        for x, old in zip(held[: 1 + norms], before, strict=False):
            x[:, :, here] = old[:, :, here]
    assert all(torch.equal(x, old) for x, old in zip(held, before, strict=True))
    assert values.isnan().all() and torch.equal(keys[:, :, first : first + tokens], k)


MANY: list[tuple[Encoder, dict[str, Any]]] = [
    (SimHash(64), {"dim": 64, "keys": 1}),
    (SimHash(64), {"dim": 128, "keys": 128, "dtype": torch.bfloat16}),
    (SimHash(64), {"dim": 128, "keys": 300, "dtype": torch.bfloat16, "first": 5, "room": 400, "batch": 2}),
    (SimHash(100), {"dim": 96, "keys": 129, "dtype": torch.float16, "room": 140, "norms": True}),
    (SimHash(256), {"dim": 256, "keys": 70, "heads": 1, "norms": True, "dtype": torch.bfloat16}),
    (SimHash(8), {"dim": 64, "keys": 200, "heads": 3, "batch": 2, "norms": True, "centred": False}),
    (AsymmetricHash(128, query_hidden=(9,)), {"dim": 128, "keys": 64, "first": 1, "room": 65, "centred": False}),
]


def encodes_many(
    encode: Any, encoder: Encoder, *, dim: int, keys: int, batch: int = 1, heads: int = 2, first: int = 0,
    room: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", norms: bool = False, centred: bool = True,
) -> None:  # fmt: skip
    """Keys that begin in the middle of their room have the encoder's bits and norms; what is around is not read."""
    g = generator(3)
    by = randomised(encoder, dim, device).maps(dim, torch.device(device))[1]
    held = torch.full((batch, heads, max(room, first + keys), dim), torch.nan).to(device, dtype)
    k = held[:, :, first : first + keys]
    k.copy_(torch.randn(k.shape, generator=g) + 1)
    centre = torch.randn(batch, heads, dim, generator=g).to(device) if centred else None
    with poisoned():
        codes, lengths = encode(k, centre, by, norms)
    zero = torch.zeros(batch, heads, dim, device=device)
    assert codes.shape == (batch, heads, keys, -(-encoder.bits // 64))
    same_bits(codes.unsqueeze(3), k.float() - (zero if centre is None else centre).unsqueeze(2), by, 1)
    assert (lengths is not None) == norms
    if norms:
        assert lengths.shape == (batch, heads, keys, 1)
        same_norms(lengths, k, zero if centre is None else centre)


def same_norms(found: Tensor, k: Tensor, centre: Tensor) -> None:
    """Norms are exact ones, rounded to bfloat16 from float32, or cut off to it as by Triton's interpreter."""
    exact = (k.double() - centre.double().unsqueeze(2)).norm(dim=-1, keepdim=True)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact * (2**-7 + 1e-6)).all()


def encoding(x: Any) -> Any:
    """The same with zeros, and a workspace that holds NaN, as large as a decoder's; of a Newest or a Placed."""
    (batch, q_heads, tokens, dim), (_, kv_heads, room, words) = x.q.shape, x.stored.codes.shape
    shape = batch, q_heads, kv_heads, tokens, dim, room, room, 1, words
    sizes = Sizes(*shape, Rule(k=1), (x.maps[0].widths, x.maps[1].widths))
    count = counters(batch * q_heads * tokens, batch * kv_heads * tokens)
    arrived = torch.zeros(count, dtype=torch.int32, device=x.q.device)
    workspace = torch.full((sizes.workspace,), 0xFF, dtype=torch.uint8, device=x.q.device)
    return replace(x, arrived=arrived, workspace=workspace)


def same_bits(code: Tensor, x: Tensor, by: Map, planes: int) -> None:
    """The levels are those of exact projections, save where these lie within float32's rounding of a step."""
    exact = in_float64(by)(x.double())
    rounding = 4 * (by(x.float()) - exact).abs().max()
    size, half = exact.abs(), 2 ** (planes - 1)
    scale = size.amax(-1, keepdim=True)
    steps = size / scale * half if planes > 1 else torch.zeros_like(size)
    level = steps.long().clamp(max=half - 1)
    level = torch.where(exact >= 0, half + level, half - 1 - level)
    found = sum(unpack_bits(code[..., j, :], exact.shape[-1]).long() << j for j in range(planes))
    sure = size > rounding
    if planes > 1:
        sure &= (steps - steps.round().clamp(max=half - 1)).abs() > 2 * half * rounding / scale
    assert torch.equal(torch.where(sure, found, 0), torch.where(sure, level, 0))
    assert sure.float().mean() > 0.99  # observed: 1
    unused = unpack_bits(code, 64 * code.shape[-1])[..., exact.shape[-1] :]
    assert not unused.any()


def in_float64(by: Map) -> Map:
    return replace(
        by, linear=by.linear.double(), weights=tuple(w.double() for w in by.weights),
        biases=tuple(b.double() for b in by.biases),
    )  # fmt: skip


def given(encoder: Encoder, *, tokens: int = 3, dim: int = 64, filled: int = 20, room: int = 30) -> Newest:
    """What encode is given, with norms of -1, for 12 queries and 4 keys at a time."""
    g, (batch, kv_heads, q_heads) = generator(7), (2, 2, 6)
    maps = randomised(encoder, dim).maps(dim, torch.device("cpu"))
    q = torch.randn(batch, q_heads, tokens, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, generator=g) for _ in range(2))
    centre, length = torch.randn(batch, kv_heads, dim, generator=g), torch.tensor([filled], dtype=torch.int32)
    keys, values = (torch.zeros(batch, kv_heads, room, dim) for _ in range(2))
    codes = torch.zeros(batch, kv_heads, room, -(-encoder.bits // 64), dtype=torch.int64)
    norms = torch.full((batch, kv_heads, room, 1), -1.0, dtype=torch.bfloat16)
    stored = Stored(keys, values, codes, length, norms)
    return encoding(Newest(q, k, v, centre, maps, encoder.query_bits, stored))


def twin(x: Newest) -> Newest:
    """The same over a copy of what is stored."""
    held = x.stored
    norms = None if held.norms is None else held.norms.clone()
    copies = (part.clone() for part in (held.keys, held.values, held.codes, held.length))
    return replace(x, stored=Stored(*copies, norms))
