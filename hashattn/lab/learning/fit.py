"""fit_layers(): fit the encoders of a model to captured queries and keys, one layer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattn.core.errors import Failure, refusals
from hashattn.core.progress import bar as progress_bar
from hashattn.encoders import Encoder
from hashattn.encoders import fitting as learned
from hashattn.encoders.learned import LearnedHash
from hashattn.encoders.sample import Sample
from hashattn.fitted import encoder_weights
from hashattn.index import Index
from hashattn.lab.learning.assemble import assemble
from hashattn.lab.learning.fit_folder import FitFolder
from hashattn.lab.learning.recipe import HOW, Recipe
from hashattn.lab.learning.shards import Shards
from hashattn.lab.recall import recall_and_mass


def fit_layers(
    shards: Shards,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    layers: Iterable[int] | None = None,
    device: torch.device | str = "cpu",
    calibrate: bool = False,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> Path | None:
    """Fit an encoder to each layer, and save them together. The same call goes on where another one was stopped.

    Several processes may share the work: each takes every world-th layer, and none waits for the others. Whichever
    finds all layers fitted writes out/pretrained.

    Args:
        shards: what was captured.
        out: a new or an empty folder, or one to resume.
        recipe: which encoder, and how; DASH-KV's own shape, ranked pairs, by default.
        layers: numbers; all that were captured by default.
        device: where to fit.
        calibrate: also fit the discounts of consensus and momentum, and the estimates of medium keys' logits.
        rank, world: which of how many processes this is.
        progress: show a bar with the recall and the mass on held-out sequences (needs tqdm).

    Returns:
        the folder for from_pretrained(); None while other processes are still at work on their layers.

    Raises:
        ValueError: too few sequences, layers that were not captured, a folder that holds something else, or layers
            that another process fits; codes that are no bits to calibrate.
        RuntimeError: a loss that is not finite; its layer is named, and its last good state kept.
    """
    recipe = recipe or Recipe()
    with refusals(ValueError):
        chosen, kept, steps = _claimed(shards, FitFolder(out), recipe, layers, calibrate, rank, world)
    folder = FitFolder(out)
    own = [i for i in chosen[rank::world] if folder.record(i) is None]
    with contextlib.ExitStack() as held:
        with refusals(ValueError):
            held.enter_context(folder.fitting(own))
        bar = held.enter_context(_Bar(len(own), steps, rank, progress))
        for layer in own:
            with refusals(ValueError):  # files that were damaged since
                samples = [_on(sample, device) for sample in shards.layer(layer)]
            fit_layer(layer, samples, kept, recipe, folder, bar)
            bar.finish()
    if any(folder.record(i) is None for i in chosen):
        return None
    return assemble(folder, shards, recipe, chosen, kept, calibrate=calibrate, device=device, progress=progress)


def _claimed(
    shards: Shards,
    folder: FitFolder,
    recipe: Recipe,
    layers: Iterable[int] | None,
    calibrate: bool,
    rank: int,
    world: int,
) -> tuple[list[int], frozenset[str], int]:
    """Check everything and make the folder this run's: the layers, the sequences that are held out, steps a layer."""
    chosen = sorted(shards.layers if layers is None else set(layers))
    if not chosen or not set(chosen) <= set(shards.layers):
        raise ValueError(f"layers must be among those that were captured, {list(shards.layers)}, got {chosen}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to world - 1 = {world - 1}, got {rank}")
    kept = held_out(shards, recipe.held_out)
    encoder = recipe.make(0, shards.facts.kv_heads)
    encoder.check_model(shards.facts.q_heads, shards.facts.kv_heads, shards.facts.head_dim)
    if calibrate and encoder.code != "binary":
        raise ValueError(
            f"calibrate=True is for codes of bits, which {type(encoder).__name__} does not make: leave it out"
        )
    described = shards.manifest.as_json()
    folder.claim(
        {"recipe": recipe.as_json(), "layers": chosen, **{n: described[n] for n in ("model", "sequences", "dtype")}}
    )
    return chosen, kept, recipe.steps if isinstance(encoder, LearnedHash) else 1


def held_out(shards: Shards, share: float) -> frozenset[str]:
    """Names of the sequences that are never fitted to: the last share of each kind, at least one in all.

    Raises:
        ValueError: fewer than two sequences.
    """
    if len(shards.sequences) < 2:
        raise ValueError(
            f"{str(shards.folder)!r} holds {len(shards.sequences)} sequence; fitting needs two or more: one is held out"
        )
    by_kind: dict[str, list[str]] = {}
    for sequence in shards.sequences:
        by_kind.setdefault(sequence.kind, []).append(sequence.name)
    last = {name for names in by_kind.values() for name in names[len(names) - round(share * len(names)) :]}
    if len(last) == len(shards.sequences):  # kinds of one sequence each
        last.discard(shards.sequences[0].name)
    return frozenset(last or {shards.sequences[-1].name})


def fit_layer(
    layer: int,
    samples: Sequence[Sample],
    kept: Iterable[str],
    recipe: Recipe,
    folder: FitFolder,
    bar: Callable[[int, int, Progress], None] | None = None,
) -> dict[str, Any]:
    """Fit and write one layer; returns its record.

    Args:
        samples: of the layer.
        kept: names of those that are held out.
        bar: called with the layer, its step and what was seen so far.

    Raises:
        RuntimeError: a loss that is not finite.
    """
    began, kept = time.perf_counter(), set(kept)
    own = [s for s in samples if s.name not in kept]
    index = recipe.composition().index
    assert index is not None
    seen = Progress([s for s in samples if s.name in kept], recipe, index)
    encoder: Any = recipe.make(layer, samples[0].k.shape[0])
    if not isinstance(encoder, LearnedHash):
        q, k = (torch.cat([getattr(s, name) for s in own], dim=1).unsqueeze(0) for name in "qk")
        with refusals(ValueError):  # too few keys, say
            encoder.fit(q, k)
    else:
        with refusals(ValueError):
            learned.check_samples(encoder, own)
        try:
            how = {name: getattr(recipe, name) for name in HOW}
            tell = None if bar is None else partial(bar, layer)
            learned.fit(encoder, own, **how, watch=lambda step, loss: seen.look(encoder, step, loss, tell))
        except FloatingPointError as error:
            where = "there was none to keep"
            if encoder.fitted:
                good = folder.write(layer, encoder, {"layer": layer, **seen.as_json()}, ".last-good")
                where = f"it is in {str(good)!r}"
            raise Failure(f"layer {layer}: {error}. Its last good state: {where}") from error
        seen.restore(encoder)
    encoder_weights.round_weights(encoder)  # from here on as it will be loaded
    recall, mass = seen.judge(encoder)
    record = {"layer": layer, **seen.as_json(), "recall": recall, "mass": mass}
    record["seconds"] = round(time.perf_counter() - began, 2)
    folder.write(layer, encoder, record)
    return record


@dataclass
class Progress:
    """What was seen of a layer on held-out sequences, and its best state."""

    samples: list[Sample]
    recipe: Recipe
    index: Index
    looks: list[dict[str, float]] = field(default_factory=list)
    best: int = -1  # of the looks
    state: dict[str, Tensor] = field(default_factory=dict)

    def judge(self, encoder: Encoder) -> tuple[float, float]:
        """Recall and mass."""
        return recall_and_mass(encoder, self.samples, index=self.index, budget=self.recipe.budget)

    def look(self, encoder: LearnedHash, step: int, loss: float, tell: Callable[[int, Progress], None] | None) -> bool:
        """Measure, keep the state if it is the best; whether to stop."""
        recall, mass = self.judge(encoder)
        self.looks.append({"step": step, "loss": loss, "recall": recall, "mass": mass})
        if self.best < 0 or recall > self.looks[self.best]["recall"]:
            self.best, self.state = len(self.looks) - 1, learned.state_of(encoder)
        if tell is not None:
            tell(step, self)
        return 0 < self.recipe.patience <= len(self.looks) - 1 - self.best

    def restore(self, encoder: LearnedHash) -> None:
        """Give the encoder its best state."""
        if self.state:
            learned.restore(encoder, self.state)

    def as_json(self) -> dict[str, Any]:
        """What layer-NN.json says of it."""
        stopped = bool(self.looks) and self.looks[-1]["step"] < self.recipe.steps
        best = self.looks[self.best]["step"] if self.looks else 0
        return {"best_step": best, "stopped_early": stopped, "looks": self.looks}


class _Bar:
    """A progress bar over the steps of all layers, with what is seen on held-out sequences."""

    def __init__(self, layers: int, steps: int, rank: int, shown: bool) -> None:
        self.bar: Any = None
        if shown and layers:
            unit = "step" if steps > 1 else "layer"
            self.bar = progress_bar("fit", "a progress bar", total=layers * steps, unit=unit, position=rank)
        self.steps, self.before = steps, 0

    def __call__(self, layer: int, step: int, seen: Progress) -> None:
        if self.bar is None:
            return
        look = seen.looks[-1]
        self.bar.set_description(f"layer {layer}", refresh=False)
        self.bar.set_postfix_str(
            f"loss {look['loss']:.3f}, held out: recall {look['recall']:.3f}, mass {look['mass']:.3f}", refresh=False
        )
        self.bar.update(self.before + step - self.bar.n)

    def finish(self) -> None:
        """The layer is done, however many steps that took."""
        self.before += self.steps
        if self.bar is not None:
            self.bar.update(self.before - self.bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _on(sample: Sample, device: torch.device | str) -> Sample:
    moved = {name: getattr(sample, name).to(device) for name in ("q", "k", "positions")}
    return dataclasses.replace(sample, **moved)
