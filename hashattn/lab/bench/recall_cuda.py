"""One layer decoded on a GPU as a model with graphs does: one captured step, replayed for token after token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.core.errors import Failure
from hashattn.core.naming import short
from hashattn.core.types import Step
from hashattn.engines.base import Request
from hashattn.engines.gpu import Gpu
from hashattn.lab.bench.cuda_contenders import dense
from hashattn.lab.bench.graphs import Captured, capture
from hashattn.lab.bench.recall_data import CapturedLayer
from hashattn.lab.steps import median_and_p99
from hashattn.ops.decode import Before

DTYPE = torch.bfloat16
SETTLING = 4  # steps that have no hint of steps like them yet
ROUNDING = 2e-2  # of the largest value, in that type


def moved(layer: CapturedLayer) -> CapturedLayer:
    """The same layer on the GPU, in the type that steps are measured in."""
    names = "q", "k", "v", "fit_q", "fit_k"
    return replace(layer, **{name: getattr(layer, name).to("cuda", DTYPE) for name in names})


def serves(attn: HashAttention, layer: CapturedLayer) -> bool:
    """Whether such steps can be captured: the GPU's engine takes them, or they attend to everything."""
    if attn.selector is None:
        return True
    heads = layer.q.shape[1], layer.k.shape[1], layer.q.shape[3]
    return not Gpu().why_not(attn.parts, Request(layer.q.device, layer.q.dtype, 1, *heads, 1))


def measure(attn: HashAttention, layer: CapturedLayer, out: Tensor, before: Sequence[Step] | None) -> dict[str, float]:
    """Decode the last positions by one captured step, and time every replay, cold, and the fastest dense attention.

    Args:
        attn: on the GPU, as is the layer; its engine captures such steps.
        out: [Hq, T, D], what the same steps gave one by one.
        before: the steps that the layer before handed on; None if it was not decoded.

    Returns:
        {"us", "p99_us", "largest_us", "dense_us"}, in microseconds; dense attention appends nothing.

    Raises:
        RuntimeError: the last step does not give what it gave.
    """
    tokens, keys = out.shape[1], layer.k.shape[2]
    first = keys - tokens
    cache = attn.new_cache(1, layer.k.shape[1], layer.k.shape[3], capacity=keys)
    cache.append(layer.k[:, :, :first].contiguous(), layer.v[:, :, :first].contiguous())
    decoder, handed = attn.decoder(cache), _handed(before)
    newest = [x[:, :, -1:].clone() for x in (layer.q, layer.k, layer.v)]
    kept = None if handed is None else Before(handed[0].ids.clone(), handed[0].weights.clone())
    outs: list[Tensor] = []
    graph = capture([lambda: outs.append(decoder(*newest, scale=layer.scale, before=kept))])
    decoder.follow()

    def ready(t: int) -> None:
        for held, x in zip(newest, (layer.q, layer.k, layer.v), strict=True):
            held.copy_(x[:, :, first + t : first + t + 1])
        if kept is not None and handed is not None:
            kept.ids.copy_(handed[t].ids), kept.weights.copy_(handed[t].weights)

    us = times(graph, tokens, ready)
    error = (outs[-1][0, :, 0].float().cpu() - out[:, -1].float().cpu()).abs().max().item()
    if not error <= ROUNDING * layer.v.abs().max().item():
        raise Failure(f"a captured step is off by {error:.2e}: {short(attn)}")
    median, p99 = median_and_p99(us[SETTLING:])
    return {"us": median, "p99_us": p99, "largest_us": max(us[SETTLING:]), "dense_us": dense_us(layer, tokens)}


def dense_us(layer: CapturedLayer, rounds: int) -> float:
    """Median microseconds of the fastest dense attention to all keys of a layer."""
    q, k, v = (x.contiguous() for x in (layer.q[:, :, -1:], layer.k, layer.v))
    found = []
    for attend in dense().values():

        def call(attend: Any = attend) -> object:
            return attend(q, k, v)

        try:
            graph = capture([call])
        except Exception:  # each library has its own way to say that it does not serve a shape
            continue
        found.append(median_and_p99(times(graph, rounds, lambda _: None))[0])
    return min(found)


def times(graph: Captured, rounds: int, ready: Callable[[int], object]) -> list[float]:
    """Microseconds of each replay, after what ready(i) writes, the cache emptied."""
    other, marks = torch.ones(1 << 27, device="cuda"), []
    for i in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready(i)
        other.sum()  # empties the cache, and keeps the device busy while the graph is launched
        start.record()
        graph.replay()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in marks]


def _handed(steps: Sequence[Step] | None) -> list[Before] | None:
    """What the layer before kept at each position, all in as many slots; None if it ran dense, or nobody asks."""
    found = [(step.previous, step.previous_weights) for step in steps or ()]
    kept = [(previous.ids, weights) for previous, weights in found if previous is not None and weights is not None]
    if not kept or len(kept) < len(found):
        return None
    most = max(ids.shape[-1] for ids, _ in kept)

    def padded(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, most - x.shape[-1]), value=value)

    return [Before(padded(ids, -1), padded(weights.float(), 0)) for ids, weights in kept]
