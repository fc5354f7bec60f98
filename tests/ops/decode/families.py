"""Steps of every family of scores, for tests on the CPU and on a GPU, and the comparison with the specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hashattn import Channels, FlatDot, FlatPQ, FlatRaBitQ, Pages, RaBitQ
from hashattn.ops.decode import Inputs, Outputs, Rule, Stored, reference, sizes_of
from hashattn.ops.decode.families import FAMILIES
from hashattn.ops.decode.kernels import Decode
from tests.ops.decode.cases import in_float64, poisoned, same
from tests.structured import generator

PAGE = 16
NAMES = tuple(name for name in FAMILIES if name != "positions")  # which has rules of its own
FORCED = [
    ({"kv_heads": 2, "batch": 2, "filled": 300, "room": 320, "starts": (0, 290)}, Rule(k=34, sinks=4, recents=30)),
    ({"tokens": 3, "filled": 90, "room": 96}, Rule(k=70, sinks=64, recents=6, shared=True)),
    ({"filled": 90, "room": 96}, Rule(k=100, recents=100, shared=True)),
]
CASES: list[tuple[dict[str, Any], Rule]] = [
    ({"group": 2, "filled": 2100, "room": 2112}, Rule(k=100)),
    ({"kv_heads": 2, "group": 3, "batch": 2, "filled": 500, "room": 520, "starts": (0, 300)},
     Rule(share=0.1, sinks=4, recents=20)),
    ({"tokens": 2, "group": 2, "filled": 300, "room": 320}, Rule(k=90, shared=True, sinks=3)),
    ({"filled": 300, "room": 333, "dim": 96}, Rule(share=1.0)),
    ({"filled": 60, "room": 64, "dim": 128}, Rule(k=10, sinks=30, recents=40)),
    ({"group": 1, "filled": 130, "room": 144, "starts": (129,)}, Rule(k=50)),
    ({"group": 5, "tokens": 3, "filled": 70, "room": 80}, Rule(share=0.01, min_k=30, shared=True)),
    ({"filled": 400, "room": 400}, Rule(share=1.0, recents=1, radius=0)),
]  # fmt: skip


def inputs(name: str, rule: Rule, seed: int = 0, **shape: Any) -> Inputs:
    """A first step over random keys, NaN outside the filled columns, with a workspace that holds anything.

    Some keys are alike, so that they tie.
    """
    size = {"batch": 1, "kv_heads": 1, "group": 4, "tokens": 1, "dim": 64, "starts": ()} | shape
    g, (batch, heads, dim), filled = generator(seed), (size["batch"], size["kv_heads"], size["dim"]), size["filled"]
    dtype, first = size.get("dtype", torch.float32), [*size["starts"]] or [0] * batch
    q = torch.randn(batch, heads * size["group"], size["tokens"], dim, generator=g).to(dtype)
    k, v = (torch.randn(batch, heads, size["room"], dim, generator=g).to(dtype) for _ in range(2))
    k[:, :, filled // 3 : filled // 2] = k[:, :, : filled // 2 - filled // 3]
    codes, query, page = _encoded(name, q, k, g, filled, first)
    k[:, :, filled:], v[:, :, filled:] = torch.nan, torch.nan
    held = Stored(k, v, codes, torch.tensor([filled], dtype=torch.int32))
    starts = torch.tensor(first, dtype=torch.int32)
    x = Inputs(q, query, held, starts, rule, dim**-0.5, size.get("causal", True), scores=name, page=page)
    return ready(x)


def _encoded(
    name: str, q: Tensor, k: Tensor, g: torch.Generator, filled: int, starts: list[int]
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Codes, packed queries and columns of a page."""
    heads = k.shape[1]
    if name == "positions":
        return k, q.unsqueeze(3), 1
    if name == "pq":
        tables = torch.randn(*q.shape[:3], 8, 32, generator=g)
        codes = torch.randint(0, 32, (*k.shape[:3], 8), generator=g).to(torch.uint8)
        codes[:, :, filled // 3 : filled // 2] = codes[:, :, : filled // 2 - filled // 3]
        return codes, FlatPQ().packed(tables, heads), 1
    if name == "rabitq":
        encoder = RaBitQ()
        return encoder.encode_key(k), FlatRaBitQ().packed(encoder.encode_query(q), heads), 1
    if name == "pages":
        store = Pages(PAGE).new_store(k.shape[2])
        store.align(starts)
        store.add(k[:, :, :filled])
        return store._codes.storage, Pages(PAGE).packed(q, heads), PAGE
    index = FlatDot() if name == "dot" else Channels(16)
    return k.clone(), index.packed(q, heads), 1


def ready(x: Inputs) -> Inputs:
    """With a state and a workspace of its own."""
    sizes, device = sizes_of(x), x.q.device
    state = torch.zeros(sizes.state, dtype=torch.int32, device=device)
    return replace(x, bounds=state, workspace=torch.full((sizes.workspace,), 0xA5, dtype=torch.uint8, device=device))


def moved(x: Inputs, device: str) -> Inputs:
    """The same on another device."""
    held = Stored(*(getattr(x.stored, name).to(device) for name in ("keys", "values", "codes", "length")))
    return ready(replace(x, q=x.q.to(device), query=x.query.to(device), stored=held, starts=x.starts.to(device)))


def agrees(step: Decode, x: Inputs, hints: tuple[int | None, ...] = (None, 0)) -> Outputs:
    """Its keys are the specification's, its outputs within rounding, and the same bits whatever the hints.

    Args:
        hints: seeds of what hints hold before a step; None: what the step before left.
    """
    expected, first = reference(x), None
    slots, device = expected.ids.shape[-1], x.q.device
    assert x.bounds is not None
    for seed in hints:
        if seed is not None:
            wrong = torch.randint(-(2**31), 2**31 - 1, (2, x.bounds.shape[1]), generator=generator(seed))
            x.bounds[:2] = wrong.to(device)
        with poisoned():
            found = step(x.q, x.query, x.scale, None)
        assert torch.equal(found.ids[..., :slots], expected.ids) and (found.ids[..., slots:] == -1).all()
        assert not x.bounds[2:].any()
        first = found if first is None else first
        assert same(found, first)
    assert first is not None
    exact, size = reference(in_float64(x)), x.stored.values[:, :, : int(x.stored.length)].double().abs().max()
    assert (first.out.double() - exact.out).abs().max() <= (3 * torch.finfo(x.q.dtype).eps + 1e-5) * size
    seen = torch.isfinite(exact.lse)
    assert torch.equal(torch.isfinite(first.lse), seen)
    assert ((first.lse - exact.lse)[seen].abs() <= 1e-4).all()
    return first
