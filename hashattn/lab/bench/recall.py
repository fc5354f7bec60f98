"""`hashattn bench recall`: what presets keep of attention, against bytes and microseconds, on the same queries."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hashattn.core.errors import refusals
from hashattn.core.progress import bar
from hashattn.core.threads import thread_count
from hashattn.core.types import Step
from hashattn.lab.bench import recall_cuda
from hashattn.lab.bench import recall_steps as steps
from hashattn.lab.bench.cuda import need_gpu
from hashattn.lab.bench.recall_data import SYNTHETIC, CapturedLayer, layers_of
from hashattn.lab.bench.recall_entries import Entry, Memo, entries, shipped_for
from hashattn.lab.kept import Truth, figures
from hashattn.lab.report import remark

DATA = ("smollm2-135m", SYNTHETIC)
ENGINES = {"cpu": "cpu", "cuda": "gpu"}  # by device


@dataclass(frozen=True)
class Settings:
    """What is compared on what.

    Attributes:
        data: "synthetic", or models as :func:`hashattn.lab.workload.model.load` takes them.
        presets: with options, as `hashattn eval` takes them; None for all.
        budget: share of the keys, for presets that take one; None for each preset's own.
        tokens: of a text, N; the synthetic layer has as many keys.
        queries: that are decoded, the last ones.
        layers: of the model; None for five of them.
        index: takes the place of each preset's own, in a line of its own; as Python writes it.
        text: a file; None for Shakespeare.
        train: steps of encoders that are learned here.
        threads: of torch and the scan while decoding.
        device: "cpu", or "cuda", where keys are bfloat16, and a step that is served is replayed from a graph.
        seed: of places, synthetic keys and random encoders.
    """

    data: tuple[str, ...] = DATA
    presets: tuple[str, ...] | None = None
    budget: float | None = 0.05
    tokens: int = 4096
    queries: int = 32
    layers: tuple[int, ...] | None = None
    index: str | None = None
    text: str | None = None
    train: int = 150
    threads: int = 1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("queries", "train", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens < 2 * self.queries:
            raise ValueError(f"--tokens must be at least twice --queries {self.queries}, got {self.tokens}")
        if self.device not in ENGINES:
            raise ValueError(f"--device must be one of {', '.join(ENGINES)}, got {self.device!r}")
        if not self.data or len(set(self.data)) < len(self.data):
            raise ValueError(f"--data must name something, and each once, got {[*self.data]}")


def run(settings: Settings | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Compare all presets on all data; `progress` shows a bar, on a terminal.

    Returns:
        {"settings": {...}, "rows": [...], "notes": [...]}; a row holds the preset's means over layers and, under
        "layers", each one's.

    Raises:
        ValueError: what cannot be compared: nothing was measured.
        RuntimeError: an engine that does not do what the reference does.
    """
    settings = settings or Settings()
    if settings.device == "cuda":
        need_gpu("bench recall --device cuda")
    with refusals(ValueError, TypeError):
        listed, notes = entries(settings.presets, settings.budget, settings.index)
        threads, before = thread_count(settings.threads), torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for data in settings.data:
        if progress:
            remark(f"{data}: queries, keys and values of {settings.tokens:,} tokens ...")
        with refusals():
            layers = layers_of(data, settings.tokens, settings.queries, settings.layers, settings.text, settings.seed)
        truths = [Truth.of(x.q[:, :, -settings.queries :], x.k, x.v, x.scale) for x in layers]
        memo: Memo = {}
        pretrained = shipped_for(data)
        total = len(listed) * len(layers)
        with bar("hf", "hashattn bench", total=total, desc=data, unit="layer", shown=progress) as shown:
            for entry in listed:
                shown.set_postfix_str(entry.label)
                found: list[dict[str, Any]] = []
                handed: list[Step] | None = None
                for i, captured in enumerate(layers):
                    layer = recall_cuda.moved(captured) if settings.device == "cuda" else captured
                    attn, weights = entry.fitted(captured, pretrained, memo, steps=settings.train, seed=settings.seed)
                    attn = attn.to(settings.device).replace(engine=ENGINES[settings.device], dense_layers=())
                    replayed = settings.device == "cuda" and recall_cuda.serves(attn, layer)
                    if settings.device == "cuda" and (not replayed or attn.selector is None):
                        attn = attn.replace(engine="reference")
                    neighbours = i > 0 and layers[i - 1].number + 1 == layer.number
                    torch.set_num_threads(threads)
                    try:
                        decoded = steps.decode(attn, layer, settings.queries, handed if neighbours else None)
                    finally:
                        torch.set_num_threads(before)
                    measured = {**figures(decoded.kept, decoded.out, truths[i]), **steps.costs(attn, layer, decoded)}
                    if replayed:
                        given = handed if neighbours else None
                        measured |= recall_cuda.measure(attn, layer, decoded.out, given)
                    elif settings.device == "cuda":
                        measured["dense_us"] = recall_cuda.dense_us(layer, settings.queries)
                    handed = decoded.after
                    found.append({"layer": layer.number, "weights": weights, **measured})
                    shown.update()
                rows.append(_row(data, entry, layers, found))
    return {"settings": asdict(settings), "rows": rows, "notes": notes}


def _row(data: str, entry: Entry, layers: Sequence[CapturedLayer], found: list[dict[str, Any]]) -> dict[str, Any]:
    """A preset on one data set: means over layers."""
    q, k = layers[0].q, layers[0].k
    numbers = [name for name, value in found[0].items() if isinstance(value, int | float) and name != "layer"]
    row = {"data": data, "preset": entry.label, "budget": entry.contender.budget, "keys": k.shape[2]}
    row |= {"q_heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": k.shape[3]}
    row["weights"] = ", ".join(dict.fromkeys(one["weights"] for one in found if one["weights"]))
    row |= {"engine": found[0]["engine"], **{n: statistics.fmean(one[n] for one in found) for n in numbers}}
    return row | {"layers": found}
