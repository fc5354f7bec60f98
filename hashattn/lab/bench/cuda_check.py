"""Correctness first: what is checked before a GPU is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.errors import Failure
from hashattn.core.types import CRITICAL, MEDIUM
from hashattn.lab.bench.caches import twin
from hashattn.lab.bench.cases import Case
from hashattn.lab.bench.cuda_inputs import GpuLayer
from hashattn.lab.bench.cuda_steps import newest_of
from hashattn.ops import decode
from hashattn.ops.attend.reference import gather
from hashattn.ops.decode.reference import choose, estimated

# What the bounds hold before a run; None: what the run before has left in them.
HINTS = {"no hint": 0, "its own hint": None, "a huge hint": torch.iinfo(torch.int32).max, "the hint after it": None}


def check_step(
    step: Callable[[], tuple[Tensor, ...]], layer: GpuLayer, bounds: Tensor, rule: decode.Rule, case: Case
) -> None:
    """Raise RuntimeError unless a step on a layer's first query does what the reference does, whatever it is hinted.

    The ids must be equal, and with tiers the tiers. Outputs may differ from float64 attention over them, in which
    logits of medium keys are estimated, by rounding, and not at all from run to run.

    Args:
        bounds: what the step finds its hints in.
    """
    q, what = layer.q[0], f"{case}, {rule}"
    expected, critical = choose(layer.inputs(0, rule))
    medium = ~critical & (expected >= 0)
    tiers = torch.where(medium, MEDIUM, CRITICAL).to(torch.int8)
    exact, size = exact_output(layer, expected, medium if rule.critical is not None else None)
    first: tuple[Tensor, Tensor] | None = None
    for hint, bound in HINTS.items():
        if bound is not None:
            bounds[: rule.chunks or 1].fill_(bound)
        poison = [torch.full_like(q, torch.nan), q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)]
        del poison  # an output that is not written would be NaN now
        out, lse, ids, *own_tiers = step()
        slots = expected.shape[-1]
        if not torch.equal(ids[..., :slots], expected) or (ids[..., slots:] != -1).any():
            raise Failure(f"{what}: with {hint} the step selects other keys than the reference; nothing is measured")
        if rule.critical is not None and not torch.equal(own_tiers[0][..., :slots], tiers):
            raise Failure(f"{what}: with {hint} other keys are critical than the reference's; nothing is measured")
        check_rounding(f"{what}: with {hint} the output", out, exact, size)
        if first is None:
            first = out.clone(), lse.clone()
        if not (torch.equal(out, first[0]) and torch.equal(lse, first[1])):
            raise Failure(f"{what}: with {hint} the output has other bits than before; nothing is measured")


def exact_output(layer: GpuLayer, ids: Tensor, medium: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float64 attention of a layer's first query to the keys at ids [B, H, 1, K], and the same of |values|.

    Args:
        medium: bool, as ids: keys whose logits are estimated; None for none.
    """
    filled = (ids >= 0).flatten(0, 2).any(0)  # of few slots where there is one for each visible key
    ids = ids[..., filled]
    pairs = []
    for b in range(len(ids)):  # a sequence at a time: float64 is large
        one = slice(b, b + 1)
        own, q = ids[one], layer.q[0][one]
        keys, values = (gather(x[one], own)[0, :, 0] for x in (layer.keys, layer.values))
        guessed = None
        if medium is not None and layer.estimate is not None:
            by = replace(layer.estimate, norms=layer.estimate.norms[one], centre=layer.estimate.centre[one])
            x = layer.inputs(0, decode.Rule(k=1))
            x = replace(x, q=q, query=x.query[one], stored=replace(x.stored, codes=layer.codes[one]), estimate=by)
            products = estimated(x, own)[0, :, 0]
            guessed = medium[b][..., filled], products.double()
        pairs.append(attention(q[0], keys.double(), values.double(), own[0] < 0, guessed))
    exact, size = (torch.stack(x) for x in zip(*pairs, strict=True))
    return exact, size


def check_dense(name: str, out: Tensor, layer: GpuLayer, case: Case) -> None:
    """Raise RuntimeError unless out is attention of the layer's first query to all keys, but for rounding."""
    for b in range(case.batch):
        exact, size = attention(layer.q[0][b], layer.keys[b].float(), layer.values[b].float())
        check_rounding(f"{case}: {name}", out[b], exact, size)


def check_whole(what: str, attn: HashAttention, cache: KVCache, layer: GpuLayer) -> None:
    """Raise RuntimeError unless a decoder's step on a cache is the reference's; the cache then holds one key more."""
    held, (k, v) = twin(cache), newest_of(layer, 0)
    decoder = attn.decoder(held)
    out = decoder(layer.q[0], k, v)
    check_alike(what, out, attn.replace(engine="reference")(layer.q[0], decoder.finish()))


def check_alike(what: str, out: Tensor, expected: Tensor) -> None:
    """Raise RuntimeError unless outputs [B, Hq, 1, D] for normally distributed values are the same but for rounding.

    A bit whose projection lies within rounding of zero may move a key at the cut: a head in ten may differ so.
    """
    close = ((out - expected).abs().amax(-1) <= 0.02).float().mean()
    if close < 0.9:
        raise Failure(f"{what} agrees with the reference in {close:.0%} of heads only; nothing is measured")


def attention(
    q: Tensor, keys: Tensor, values: Tensor, empty: Tensor | None = None, guessed: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [Hq, 1, D] to keys and values [H, K, D], in their dtype: (out [Hq, 1, D], and out of |values|).

    Args:
        empty: bool [H, 1, K], keys that are none.
        guessed: bool [H, 1, K], keys that are not read, and [H, Hq / H, K], what stands for their products with q.
    """
    grouped = q.to(keys.dtype).view(len(keys), -1, q.shape[-1])  # heads that share keys
    products = grouped @ keys.transpose(-1, -2)
    logits = (products if guessed is None else torch.where(*guessed, products)) * q.shape[-1] ** -0.5
    weights = torch.softmax(logits if empty is None else logits.masked_fill(empty, -torch.inf), -1)
    return (weights @ values).view(q.shape), (weights @ values.abs()).view(q.shape)


def check_rounding(what: str, out: Tensor, exact: Tensor, size: Tensor) -> None:
    """Raise RuntimeError unless out is the exact output but for rounding; size: the exact output of |values|."""
    # Weights and the output are rounded to the dtype, each by half an eps: twice that is allowed. Logits are float32.
    allowed = torch.finfo(out.dtype).eps * (exact.abs() + size) + 1e-5 * size
    worst = ((out - exact).abs() / allowed).nan_to_num(torch.inf).max().item()
    if worst > 1:
        raise Failure(f"{what} is off by {worst:.3g} times what rounding allows; nothing is measured")
