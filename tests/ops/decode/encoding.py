"""Encoders with random weights, and the check of what is encoded and appended, that tests on CPU and GPU share."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from hashattn import AsymmetricHash, Encoder, SimHash, SymmetricHash
from hashattn.encoders.learned import LearnedHash
from hashattn.ops.decode import Map, Rule, Sizes
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
    seed: int = 0, norms: bool = False,
) -> None:  # fmt: skip
    """Queries and keys have the encoder's bits, all that keys need is appended, and nothing else is written."""
    g = generator(seed)
    encoder = randomised(encoder, dim, device, seed)
    maps, words = encoder.maps(dim, torch.device(device)), -(-encoder.bits // 64)
    q = (3 * torch.randn(batch, kv_heads * group, tokens, dim, generator=g)).to(device, dtype)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, generator=g).to(device, dtype) for _ in range(2))
    centre = torch.randn(batch, kv_heads, dim, generator=g).to(device)
    held = (
        *(torch.randn(batch, kv_heads, room, dim, generator=g).to(device, dtype) for _ in range(2)),
        torch.randint(-(2**63), 2**63 - 1, (batch, kv_heads, code_room, words), generator=g).to(device),
    )
    if norms:
        held += (torch.randn(batch, kv_heads, code_room, 1, generator=g).to(device, torch.bfloat16),)
    before, (arrived, workspace) = [x.clone() for x in held], encoding_state(q, k, held[2], maps)
    length = torch.tensor([filled], dtype=torch.int32, device=device)
    with poisoned():
        query = encode(q, k, v, centre, maps, encoder.query_bits, *held[:3], length, arrived, workspace, *held[3:])
    assert int(length) == filled + tokens
    assert not arrived.any()
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


def same_norms(found: Tensor, k: Tensor, centre: Tensor) -> None:
    """Norms are exact ones, rounded to bfloat16 from float32, or cut off to it as by Triton's interpreter."""
    exact = (k.double() - centre.double().unsqueeze(2)).norm(dim=-1, keepdim=True)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact * (2**-7 + 1e-6)).all()


def encoding_state(q: Tensor, k: Tensor, codes: Tensor, maps: tuple[Map, Map]) -> tuple[Tensor, Tensor]:
    """What encode is given beside: zeros, and a workspace that holds NaN, as large as a decoder's."""
    (batch, q_heads, tokens, dim), room = q.shape, codes.shape[2]
    sizes = Sizes(batch, q_heads, k.shape[1], tokens, dim, room, room, 1, codes.shape[3], Rule(k=1),
                  (maps[0].widths, maps[1].widths))  # fmt: skip
    arrived = torch.zeros(counters(q[..., 0].numel(), k[..., 0].numel()), dtype=torch.int32, device=q.device)
    return arrived, torch.full((sizes.workspace,), 0xFF, dtype=torch.uint8, device=q.device)


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
    return dataclasses.replace(
        by, linear=by.linear.double(), weights=tuple(w.double() for w in by.weights),
        biases=tuple(b.double() for b in by.biases),
    )  # fmt: skip
