"""Correctness first: what is checked before a model's decoding is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hashattn.cache.kv_cache import KVCache
from hashattn.core.errors import Failure
from hashattn.lab.bench.cuda_check import attention, check_rounding
from hashattn.lab.bench.e2e_attention import DenseLayers, HashedLayers
from hashattn.lab.bench.e2e_model import Decoding

STEPS = 3  # of a graph, compared with as many from Python
ALLOWED = 0.03  # of the logits' norm, where a product rounds otherwise in a graph; wrong steps are off by more

Layers = DenseLayers | HashedLayers


def check_every_key(decoding: Decoding, contenders: Mapping[str, Layers], caches: Sequence[KVCache], keys: int) -> None:
    """Run a step of the model with each contender: every layer must attend to all `keys` keys as float64 does.

    Raises:
        RuntimeError: a layer is off by more than rounding.
    """
    for name, attend in contenders.items():

        def checked(layer: int, q: Tensor, k: Tensor, v: Tensor, name: str = name, attend: Layers = attend) -> Tensor:
            out = attend(layer, q, k, v)
            held = [caches[layer].storage(what)[:, :, :keys].double() for what in ("keys", "values")]
            for b in range(len(q)):
                exact, size = attention(q[b], held[0][b], held[1][b])
                check_rounding(f"{name}, layer {layer}: the output", out[b], exact, size)
            return out

        attend.restart()
        decoding.restart(keys - 1)
        decoding.step(checked)


def check_graph(name: str, decoding: Decoding, attend: Layers, keys: int, replay: Callable[[], Tensor]) -> None:
    """Compare a few replays of a captured step, which returns logits, with as many steps from Python.

    Raises:
        RuntimeError: the logits differ.
    """

    def after(step: Callable[[], Tensor]) -> Tensor:
        attend.restart()
        decoding.restart(keys - 1)
        for _ in range(STEPS):
            decoding.token.zero_()  # a near tie of two tokens must not decide
            logits = step()
        return logits.float().clone()

    expected, found = after(lambda: decoding.step(attend)), after(replay)
    error = ((found - expected).norm() / expected.norm()).nan_to_num(torch.inf).item()
    if error > ALLOWED:
        raise Failure(f"{name}: the captured step is off by {error:.3g} of the logits; nothing is measured")
