"""Queries, keys and values that presets are compared on: of a model's layers, or made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.lab.workload.model import load
from hashattn.lab.workload.texts import read_text, windows

SYNTHETIC = "synthetic"
HEADS, DIM, NUMBER = (9, 3), 64, 15  # of the synthetic layer: as if it were SmolLM2's in the middle
_SPREAD = (0.1, 0.38, 0.41, 0.66, 0.93)  # which of a model's layers: two of them neighbours, for momentum
_FIT_QUERIES = 1024


@dataclass(frozen=True, eq=False)
class CapturedLayer:
    """One attention layer over one text, and what encoders are fitted to: another one.

    Attributes:
        number: in the model.
        q: float32 [1, Hq, N, D], queries of all positions, post-RoPE.
        k, v: float32 [1, Hkv, N, D].
        fit_q: [1, Hq, T, D], the last T queries of the other text.
        fit_k: [1, Hkv, N, D], its keys.
        scale: of the logits.
    """

    number: int
    q: Tensor
    k: Tensor
    v: Tensor
    fit_q: Tensor
    fit_k: Tensor
    scale: float


def layers_of(
    name: str, keys: int, queries: int, numbers: Sequence[int] | None, text: str | None, seed: int
) -> list[CapturedLayer]:
    """The layers of a model, by a name that load() takes, over a text; or one made up, for "synthetic".

    Args:
        keys: tokens of the text.
        queries: that will ask, the last ones.
        numbers: which layers of the model; None for five of them.
        text: file that is read; None for Shakespeare.
        seed: of the places in the text, or of the synthetic keys.

    Raises:
        ValueError: a model, layer or text that cannot be had, or a text that is too short.
    """
    return [synthetic(keys, queries, seed=seed)] if name == SYNTHETIC else captured(name, keys, numbers, text, seed)


def synthetic(
    keys: int, queries: int, *, heads: tuple[int, int] = HEADS, dim: int = DIM, seed: int = 0
) -> CapturedLayer:
    """Two offset cones with planted neighbours: 8 a query and head, of many strengths, among keys of one mean.

    A few noisy channels dominate the keys, and queries avoid them. No key is asked for twice: past queries say nothing
    about later ones. The cones are always the same; the seed draws what lies in them.
    """
    q, k, v = _cones(keys, queries, heads, dim, 2 * seed)
    fit_q, fit_k, _ = _cones(keys, queries, heads, dim, 2 * seed + 1)
    return CapturedLayer(NUMBER, q, k, v, fit_q[:, :, -queries:], fit_k, dim**-0.5)


def _cones(keys: int, queries: int, heads: tuple[int, int], dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    fixed, g = torch.Generator().manual_seed(20260419), torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    group, noise = q_heads // kv_heads, dim // 8
    k_mean = 2 * torch.randn(1, kv_heads, 1, dim, generator=fixed)
    q_mean = 0.5 * torch.randn(1, q_heads, 1, dim, generator=fixed)
    noisy = torch.linalg.qr(torch.randn(dim, dim, generator=fixed)).Q[:noise]
    q = torch.randn(1, q_heads, keys, dim, generator=g) + q_mean
    q = q - q @ noisy.T @ noisy
    k = torch.randn(1, kv_heads, keys, dim, generator=g)
    k = k + 4 * torch.randn(1, kv_heads, keys, noise, generator=g) @ noisy
    planted = max(1, min(8, (keys - queries) // (2 * group * queries)))
    places = torch.randperm(keys - queries, generator=g)[: group * queries * planted].view(group, queries, planted)
    strengths = 0.3 + 0.9 * torch.rand(q_heads, queries, planted, 1, generator=g)
    asking = q[0, :, -queries:, None]  # [Hq, T, 1, D]
    for head in range(q_heads):
        k[0, head // group, places[head % group]] += strengths[head] * asking[head]
    return q, k + k_mean, torch.randn(k.shape, generator=g)


@torch.no_grad()
def captured(model: str, keys: int, numbers: Sequence[int] | None, text: str | None, seed: int) -> list[CapturedLayer]:
    """Of a model that reads two places of a text, densely: one to fit to, one to judge on."""
    from hashattn.integrations.transformers import capture, support
    from hashattn.integrations.transformers.capture import capturable

    network, tokenizer = load(model)
    modules, whole = support.attention_modules(network), capturable(network, numbers)
    if numbers is None:
        whole = sorted({whole[round(share * (len(whole) - 1))] for share in _SPREAD})
    fit_ids, ids = windows(tokenizer, read_text(text), keys, 2, seed=seed)
    fit = capture(network, fit_ids, layers=whole, queries=_FIT_QUERIES)
    found = capture(network, ids, layers=whole)
    layers = []
    for number, c in found.items():
        scale = float(getattr(modules[number], "scaling", None) or c.q.shape[-1] ** -0.5)
        q, k, v, fit_q, fit_k = (x.float() for x in (c.q, c.k, c.v, fit[number].q, fit[number].k))
        layers.append(CapturedLayer(number, q, k, v, fit_q, fit_k, scale))
    return layers
