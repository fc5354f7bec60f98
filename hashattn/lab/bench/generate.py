"""`hashattn bench generate`: what a user of model.generate() gets, stock and attached."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hashattn.core.errors import Failure, refusals
from hashattn.core.progress import bar
from hashattn.lab.bench.cuda_graphs import first_line
from hashattn.lab.bench.generate_check import failing, fresh
from hashattn.lab.bench.generate_clock import Call, Timed, timed
from hashattn.lab.bench.generate_contenders import Contender, contenders
from hashattn.lab.bench.generate_models import Source, check_positions, random_prompt
from hashattn.lab.steps import median_and_p99

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hashattn.integrations.attached.report import Report

SETTLING = 8  # tokens after the first one that count among no median: compilers and graphs may be at work


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        source: the model.
        tokens: of the prompts.
        batches: sequences.
        presets: with options, that are attached.
        budget: share of the keys; None is each preset's own.
        steps: tokens that are timed after the first ones.
        compiled: whether static caches, for which the model is compiled, are measured as well.
        chunk: of the prefill; see Call.
        graph: attach()'s argument; None leaves it out.
    """

    source: Source
    tokens: Sequence[int]
    batches: Sequence[int]
    presets: Sequence[str]
    budget: float | None = 0.01
    steps: int = 100
    compiled: bool = True
    chunk: int | None = None
    graph: str | None = None

    def contenders(self, device: torch.device) -> list[Contender]:
        """Who generates there."""
        again = device.type == "cuda"  # whose cuDNN plans attention anew for every length
        return contenders(self.presets, self.budget, compiled=self.compiled, graph=self.graph, again=again)


@dataclass(frozen=True)
class Measured:
    """What one contender did: its first call, the call that counts, and what ran in it, if it was attached."""

    first: Timed
    timed: Timed
    report: Report | None

    def row(self) -> dict[str, Any]:
        """Its part of a row of results."""
        now, later = self.timed, self.timed.steps[SETTLING:]
        pace, slow = median_and_p99(later)
        report = self.report
        return {
            "ms": pace * 1e3,
            "p99_ms": slow * 1e3,
            "slowest_ms": max(now.steps) * 1e3,
            "first_token_ms": now.steps[0] * 1e3,
            "prefill_ms": now.prefill * 1e3,
            "warm_up_s": max(0.0, self.first.seconds - now.seconds),
            "memory_bytes": now.memory,
            "peak_bytes": now.peak,
            "keys_read": 1.0 if report is None else report.keys_read,
            "searching_layers": 0 if report is None else len(report.searching_layers),
            "report": None if report is None else str(report).splitlines(),
        }


def run(
    settings: Settings,
    device: torch.device,
    *,
    progress: bool = True,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """Check every contender, then let each generate behind random prompts. Keys are random: cost, not quality.

    Args:
        keep: told the result after each contender.

    Returns:
        {"model", "weights", "dtype", "notes", "failed", "rows"}; "failed" says by label why there is no figure.

    Raises:
        RuntimeError: nothing could be measured.
        ValueError: settings that cannot be used.
    """
    with refusals():
        settings.source.check()
        everyone = settings.contenders(device)
        network = settings.source.make(device)
        check_positions(network, max(settings.tokens) + SETTLING + settings.steps)
        for contender in everyone:  # refuses a model that it cannot serve, and arguments that attach() does not know
            with contender.attached(network, contender.composition(max(settings.tokens))):
                pass
    result: dict[str, Any] = settings.source.described() | {"steps": settings.steps, "budget": settings.budget}
    result |= {"graph": settings.graph, "notes": [], "failed": {}, "rows": []}
    todo = [(keys, batch, one) for keys in settings.tokens for batch in settings.batches for one in everyone]
    with bar("hf", "hashattn bench", total=len(todo) + 1, desc="bench", unit="run", shown=progress) as shown:
        result["failed"] |= _failing(settings, network, everyone, result["notes"])
        shown.update()
        for keys, batch, contender in todo:
            if contender.label not in result["failed"]:
                _add(result, settings, network, contender, keys, batch)
                keep(result)
            shown.update()
    if not result["rows"]:
        raise Failure(f"nothing could be measured: {next(iter(result['failed'].values()), 'no case fits')}")
    return result


def _failing(
    settings: Settings, network: PreTrainedModel, everyone: Sequence[Contender], notes: list[str]
) -> dict[str, str]:
    few = settings.source.for_checks()
    with _noted(notes):
        return failing(network if few == settings.source else few.make(network.device), everyone)


def _add(
    result: dict[str, Any], settings: Settings, network: PreTrainedModel, contender: Contender, keys: int, batch: int
) -> None:
    """Measure a contender and add its row; or why there is none."""
    where = {"label": contender.label, "batch": batch, "keys": keys}
    try:
        with _noted(result["notes"]):
            found = _measure(settings, network, contender, random_prompt(network, batch, keys))
    except torch.OutOfMemoryError:
        result["notes"].append(f"{contender.label}: {batch} sequences of {keys:,} keys do not fit the memory")
        return
    except Exception as error:  # an unattended run goes on with the others
        result["failed"][f"{contender.label}, {batch} sequences of {keys:,} keys"] = first_line(error)
        return
    row = where | found.row() | {"tokens_per_s": batch / found.row()["ms"] * 1e3}
    result["rows"].append(row)
    for stock, name in ((Contender(None, False), "times_stock_dynamic"), (Contender(None, True), "times_stock_static")):
        same = {"label": stock.label, "batch": batch, "keys": keys}
        base = next((r["ms"] for r in result["rows"] if same.items() <= r.items()), None)
        row[name] = None if base is None else base / row["ms"]


def _measure(settings: Settings, network: PreTrainedModel, contender: Contender, ids: Tensor) -> Measured:
    attn, call = contender.composition(ids.shape[1]), Call(contender.static, settings.chunk)
    with contender.attached(fresh(network), attn) as (own, handle):
        tokens = SETTLING + settings.steps + 1
        equal = contender.static or contender.again or ids.shape[1] <= tokens  # static caches compile for a length
        first = timed(own, ids if equal else ids[:, tokens:], call, tokens)
        if handle is not None:
            handle.reset_report()
        return Measured(first, timed(own, ids, call, tokens), None if handle is None else handle.report())


@contextlib.contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """Take down what is warned of within this block, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        finally:
            said = [str(w.message).splitlines()[0] for w in caught if issubclass(w.category, UserWarning)]
            notes += [line for line in dict.fromkeys(said) if line not in notes]
