"""Correctness first: what is checked before a GPU is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hashattn.bench.cases import Case
from hashattn.bench.cuda_inputs import Layer
from hashattn.ops import decode
from hashattn.ops.attend.reference import gather

# What the bounds hold before a run; None: what the run before has left in them.
HINTS = {"no hint": 0, "its own hint": None, "a huge hint": torch.iinfo(torch.int32).max, "the hint after it": None}


def check_step(step: Callable[[], tuple[Tensor, Tensor, Tensor]], layer: Layer, rule: decode.Rule, case: Case) -> None:
    """Raise RuntimeError unless a step on a layer's first query does what the reference does, whatever it is hinted.

    The ids must be equal. Outputs may differ from float64 attention over them by rounding, and not at all from run to
    run.
    """
    q, scale = layer.q[0], case.head_dim**-0.5
    _, _, expected = decode.reference(
        q, layer.query[0], layer.keys, layer.values, layer.codes, layer.starts, layer.length, rule, scale=scale
    )
    pairs = []
    for b in range(case.batch):  # a sequence at a time: float64 is large
        own = expected[b : b + 1]
        keys, values = (gather(x[b : b + 1], own)[0, :, 0] for x in (layer.keys, layer.values))
        pairs.append(attention(q[b], keys.double(), values.double()))
    exact, size = (torch.stack(x) for x in zip(*pairs, strict=True))
    first: tuple[Tensor, Tensor] | None = None
    for hint, bound in HINTS.items():
        if bound is not None:
            layer.bounds[0].fill_(bound)
        poison = [torch.full_like(q, torch.nan), q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)]
        del poison  # an output that is not written would be NaN now
        out, lse, ids = step()
        slots = expected.shape[-1]
        if not torch.equal(ids[..., :slots], expected) or (ids[..., slots:] != -1).any():
            raise RuntimeError(
                f"{case}: with {hint} the step selects other keys than the reference; nothing is measured"
            )
        _check_rounding(f"{case}: with {hint} the output", out, exact, size)
        if first is None:
            first = out.clone(), lse.clone()
        if not (torch.equal(out, first[0]) and torch.equal(lse, first[1])):
            raise RuntimeError(f"{case}: with {hint} the output has other bits than before; nothing is measured")


def check_dense(name: str, out: Tensor, layer: Layer, case: Case) -> None:
    """Raise RuntimeError unless out is attention of the layer's first query to all keys, but for rounding."""
    for b in range(case.batch):
        exact, size = attention(layer.q[0][b], layer.keys[b].float(), layer.values[b].float())
        _check_rounding(f"{case}: {name}", out[b], exact, size)


def attention(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [Hq, 1, D] to keys and values [H, K, D], in their dtype: (out [Hq, 1, D], and out of |values|)."""
    grouped = q.to(keys.dtype).view(len(keys), -1, q.shape[-1])  # heads that share keys
    weights = torch.softmax(grouped @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return (weights @ values).view(q.shape), (weights @ values.abs()).view(q.shape)


def _check_rounding(what: str, out: Tensor, exact: Tensor, size: Tensor) -> None:
    # Weights and the output are rounded to the dtype, each by half an eps: twice that is allowed. Logits are float32.
    allowed = torch.finfo(out.dtype).eps * (exact.abs() + size) + 1e-5 * size
    worst = ((out - exact).abs() / allowed).nan_to_num(torch.inf).max().item()
    if worst > 1:
        raise RuntimeError(f"{what} is off by {worst:.3g} times what rounding allows; nothing is measured")
