"""Calibration: the discounts of consensus and momentum, and the estimates of medium keys' logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.attend import MixedPrecision
from hashattn.core.errors import UserError
from hashattn.core.progress import bar
from hashattn.core.types import Selection, Step
from hashattn.encoders import Encoder, PerLayer
from hashattn.encoders.sample import Sample
from hashattn.fitted import encoder_weights
from hashattn.fitted.calibration import Calibration
from hashattn.index.view import View
from hashattn.lab.kept import logits_of, seen_from
from hashattn.lab.learning.recipe import SEEDS, Recipe
from hashattn.lab.learning.shards import Shards
from hashattn.ops import hamming
from hashattn.selectors import Consensus, Momentum, Recent, Selector, Sink, TopK

GRID = (0.0, 1.0, 2.0, 4.0, 8.0)  # discounts in bits; times 2^b - 1 for a query of b planes
SEQUENCES, QUERIES = 4, 32  # looked at, of each layer and of each sequence
ESTIMATED = 16  # queries that the estimates of medium keys are fitted to: a residual is slow to fit
FORCED = Sink(4) | Recent(64)  # as the presets force them


def calibrated(
    encoder: PerLayer,
    shards: Shards,
    kept: Collection[str],
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Calibration, dict[str, Any]]:
    """Fit what DASH-KV (arXiv 2604.19351) calibrates, on the sequences that encoders were fitted to.

    Of a few discounts the one that keeps most attention mass at the budget is taken: first consensus, by itself, then
    momentum around it, with the layers in order. Ties go to the smaller one; where none changes anything (sequences so
    short that forced keys take the budget, say) none is chosen. a and the residual of MixedPrecision are
    fitted a layer at a time, to the keys within twice the budget.

    Args:
        encoder: fitted to every layer that is to be calibrated.
        kept: names of the sequences that are held out.
        recipe: its budget and seed.
        device: where to do so; the encoder goes there and comes back.
        progress: show a bar (needs tqdm).

    Returns:
        the calibration, and what each discount kept: plain types, for the records.
    """
    encoder.to(device)
    unit = 2**encoder.query_bits - 1
    grid = [unit * discount for discount in GRID]
    names = [s.name for s in shards.sequences if s.name not in kept][:SEQUENCES]
    layers = _Layers(encoder, shards, names, device, progress)
    top = TopK(share=recipe.budget)
    mixed: dict[int, MixedPrecision] = {}
    masses = torch.zeros(len(grid))
    for layer, one, samples in layers:
        for sample in samples:
            view = view_of(one, sample)
            for i, discount in enumerate(grid):
                selection = (FORCED | Consensus(top, discount=discount)).select(view, Step(layer))
                masses[i] += mass_of(sample, selection)[0]
        if not one.biased:  # a bias says nothing about angles
            mixed[layer] = fit_mixed(samples, one, share=min(1.0, 2 * recipe.budget), seed=recipe.seed * SEEDS + layer)
    consensus = _best(grid, masses)
    total = len(encoder.layers) * len(names)
    found: dict[str, Any] = {"consensus": _table(grid, masses / total), "a": {i: m.a.item() for i, m in mixed.items()}}
    momentum = None
    if any(i - 1 in encoder.layers for i in encoder.layers):  # it comes from the layer before, if that searched too
        inner = Consensus(top, discount=consensus or 0.0)
        selectors = [FORCED | Momentum(inner, discount=discount) for discount in grid]
        masses = momentum_masses(layers, selectors)
        momentum = _best(grid, masses)
        found["momentum"] = _table(grid, masses / total)
    encoder.to("cpu")
    return Calibration(consensus, momentum, {i: stage.cpu() for i, stage in mixed.items()}), found


def momentum_masses(layers: Iterable[tuple[int, Encoder, Sequence[Sample]]], selectors: Sequence[Selector]) -> Tensor:
    """The mass that each selector keeps, summed over layers and sequences, each layer told what the one before chose.

    Raises:
        ValueError: shards whose layers hold different queries.
    """
    masses = torch.zeros(len(selectors))
    told: list[dict[str, Step]] = [{} for _ in selectors]
    positions: dict[str, Tensor] = {}
    last = -2
    for layer, one, samples in layers:
        for sample in samples:
            if not torch.equal(positions.setdefault(sample.name, sample.positions), sample.positions):
                raise UserError(f"layer {layer} of {sample.name!r} holds other queries than the layers before it")
            view = view_of(one, sample)
            for i, selector in enumerate(selectors):
                before = told[i].get(sample.name) if last == layer - 1 else None
                selection = selector.select(view, before or Step(layer))
                mass, weights = mass_of(sample, selection)
                masses[i] += mass
                told[i][sample.name] = Step(layer + 1, selection, weights)
        last = layer
    return masses


def view_of(encoder: Encoder, sample: Sample) -> View:
    """What a selector sees of a sample: each query, the keys up to its own position."""
    query, codes = encoder.encode_query(sample.q.unsqueeze(0)), encoder.encode_key(sample.k.unsqueeze(0))
    spans = [[(0, position + 1) for position in sample.positions.tolist()]]
    keys, (q_heads, kv_heads) = sample.k.shape[1], (len(sample.q), len(sample.k))

    def scan() -> Tensor:
        return hamming.distances(query, codes, biased=encoder.biased)

    return View(spans, q_heads, kv_heads, keys, scan, sample.k.device, query, codes, biased=encoder.biased)


def mass_of(sample: Sample, selection: Selection) -> tuple[float, Tensor]:
    """The mean attention mass of the selected keys, and the softmax over them, float32 [1, Hq, T, K]."""
    seen = seen_from(sample.positions, sample.k.shape[1])
    logits = logits_of(sample.q, sample.k, seen, sample.q.shape[-1] ** -0.5).unsqueeze(0)  # [1, Hq, T, N]
    ids = selection.ids.long().repeat_interleave(logits.shape[1] // selection.ids.shape[1], dim=1)
    chosen = logits.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    mass = (torch.logsumexp(chosen, -1) - torch.logsumexp(logits, -1)).exp()
    return float(mass.mean()), torch.softmax(chosen, -1)


def fit_mixed(samples: Sequence[Sample], encoder: Encoder, *, share: float, seed: int) -> MixedPrecision:
    """The scale and residual of a layer's medium keys, half of the nearest `share`, rounded to what is stored.

    They are fitted to the last queries of each sequence.
    """
    keys, tokens = max(s.k.shape[1] for s in samples), min(ESTIMATED, *(len(s.positions) for s in samples))
    q = torch.stack([s.q[:, -tokens:] for s in samples])
    k = torch.stack([F.pad(s.k, (0, 0, 0, keys - s.k.shape[1])) for s in samples])  # no query sees what is added
    positions = torch.stack([s.positions[-tokens:] for s in samples])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # what is drawn and made is so on the CPU
        stage = MixedPrecision().to(q.device)
        stage.fit(q, k, encoder, positions=positions, critical=share / 2, share=share)
    encoder_weights.round_weights(stage)
    return stage


class _Layers:
    """Goes through the layers in order, with the encoder and a few queries of a few sequences of each."""

    def __init__(
        self, encoder: PerLayer, shards: Shards, names: Sequence[str], device: torch.device | str, shown: bool
    ) -> None:
        self.encoder, self.shards, self.names, self.device, self.shown = encoder, shards, names, device, shown

    def __iter__(self) -> Iterator[tuple[int, Encoder, list[Sample]]]:
        numbers: Any = self.encoder.layers
        if self.shown:
            numbers = bar("fit", "a progress bar", numbers, desc="calibrating", unit="layer")
        for layer in numbers:
            samples = [s for s in self.shards.layer(layer) if s.name in self.names]
            yield layer, self.encoder.layer(layer), [few(s, self.device) for s in samples]


def few(sample: Sample, device: torch.device | str) -> Sample:
    """The sample with QUERIES of its queries, evenly spaced, on a device."""
    count = len(sample.positions)
    rows = torch.linspace(0, count - 1, min(QUERIES, count)).round().long()
    return dataclasses.replace(
        sample, q=sample.q[:, rows].to(device), k=sample.k.to(device), positions=sample.positions[rows].to(device)
    )


def _best(grid: Sequence[float], masses: Tensor) -> float | None:
    return None if bool((masses == masses[0]).all()) else grid[int(masses.argmax())]


def _table(grid: Sequence[float], masses: Tensor) -> dict[str, float]:
    return {f"{discount:g}": round(mass, 6) for discount, mass in zip(grid, masses.tolist(), strict=True)}
