"""The evaluation: every contender on the same windows and questions, beside full attention and exact top-k."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.core.errors import refusals
from hashattn.core.progress import bar
from hashattn.lab.evaluation import fidelity, perplexity, retrieval, tensors
from hashattn.lab.evaluation.contenders import EXACT, FULL, Contender, searching
from hashattn.lab.evaluation.continuation import judge, looks_back
from hashattn.lab.workload.prefill import positions_of
from hashattn.lab.workload.retrieval import TASKS, Question
from hashattn.lab.workload.texts import Text, windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = ("tensors", "perplexity", "fidelity", "retrieval")
# Far from the seeds of captures, so that nobody is judged by the prompts that encoders were fitted to.
SEEDS = 1_000_000

Record = dict[str, Any]
Judged = Sequence[tuple[Contender, HashAttention]]
Tick = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Attributes:
        parts: of PARTS.
        tokens: lengths of windows and prompts.
        windows, questions: of each length, task and seed.
        tasks: of hashattn.lab.workload.retrieval.TASKS.
        seeds: of places in the text, questions, and random encoders.
        sparse: tokens at the end of a window that are predicted by sparse attention.
        simulate: perplexity of whole windows instead, every position sparse.
        decoded: tokens that the model writes after a window, for recall on decoded keys and for fidelity.
        queries: of the last positions, that recall is measured with.
        layers: for recall; all of full attention if None.
    """

    parts: tuple[str, ...] = PARTS
    tokens: tuple[int, ...] = (2048,)
    windows: int = 4
    questions: int = 6
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = (0,)
    sparse: int = 256
    simulate: bool = False
    decoded: int = 160
    queries: int = 32
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, known in (("parts", PARTS), ("tasks", TASKS)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong or not getattr(self, name):
                raise ValueError(f"{name} must be among {', '.join(known)}, got {wrong or 'none'}")
        if not self.tokens or not self.seeds or len({*self.tokens}) < len(self.tokens):
            raise ValueError(f"tokens and seeds must be given, and each once, got {self.tokens} and {self.seeds}")
        for name in ("windows", "questions", "sparse", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, least in (("tokens", 2), ("seeds", 0)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {min(getattr(self, name))}")
        if self.decoded < 0:
            raise ValueError(f"decoded must be at least 0, got {self.decoded}")
        if self.decoded < 1 and "fidelity" in self.parts:
            raise ValueError("decoded must be at least 1 for fidelity, which is judged on what the model writes, got 0")
        if self.sparse > min(self.tokens) - 2 and "perplexity" in self.parts and not self.simulate:
            raise ValueError(
                f"sparse must be at most {min(self.tokens) - 2} for windows of {min(self.tokens)} tokens, got "
                f"{self.sparse}"
            )


@dataclass(frozen=True, eq=False)
class Unit:
    """One window or question: what is measured on it, and the steps of a progress bar that this takes."""

    part: str
    tokens: int
    seed: int
    number: int
    steps: int
    ids: Tensor | None = None
    question: Question | None = None

    @property
    def record(self) -> Record:
        """What its records share."""
        task = {} if self.question is None else {"task": self.question.task, "depth": self.question.depth}
        return {"part": self.part, "tokens": self.tokens, "seed": self.seed, "unit": self.number, **task}


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    entries: Sequence[Contender],
    settings: Settings,
    *,
    progress: bool = False,
) -> list[Record]:
    """Measure everything; a record for each unit, contender and protocol.

    Args:
        model: a causal language model that can be attached.
        tokenizer: the model's.
        text: what is evaluated on.
        entries: from :func:`hashattn.lab.evaluation.contenders.contenders`.
        settings: what to measure.
        progress: show a progress bar (needs tqdm).

    Returns:
        Records: part, task, protocol, tokens, seed, unit, contender, budget, dense, bits, and "values".

    Raises:
        ValueError: a text that is too short, lengths beyond the model's context, a model that cannot be attached, or
            compositions that do not fit it; before anything is measured.
    """
    with refusals(ValueError):
        _check(model, entries, settings)
        units = [*_units(model, tokenizer, text, entries, settings)]
    total = sum(u.steps for u in units)
    with bar("hf", "an evaluation", total=total, unit="run", shown=progress) as shown:
        records: list[Record] = []
        made: dict[tuple[int, int], Judged] = {}
        for unit in units:
            shown.set_description(f"{unit.record.get('task', unit.part)}, {unit.tokens} tokens")
            if (unit.tokens, unit.seed) not in made:
                made = {(unit.tokens, unit.seed): [(e, _searching(model, e, unit)) for e in entries]}
            records += _MEASURES[unit.part](model, unit, made[unit.tokens, unit.seed], settings, shown.update)
    return records


def _check(model: PreTrainedModel, entries: Sequence[Contender], settings: Settings) -> None:
    limit = positions_of(model)
    longest = max(settings.tokens) + (settings.decoded if {"tensors", "fidelity"} & {*settings.parts} else 16)
    if limit is not None and longest > limit:
        rest = longest - max(settings.tokens)
        said = f"({limit} positions, {rest} of them for what it writes)"
        raise ValueError(f"tokens must be at most {limit - rest} for this model {said}, got {max(settings.tokens)}")
    for entry in entries:
        attn = entry.composition(settings.tokens[0])
        if attn.index is not None:
            attn.index.new_store(min(settings.tokens) - 1)  # refuses what cannot be fitted to so few keys
        with attn.attach(model, simulate=True):
            pass
    if "tensors" in settings.parts and settings.layers is not None:
        from hashattn.integrations.transformers.capture import capturable

        capturable(model, settings.layers)


def _units(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    entries: Sequence[Contender],
    settings: Settings,
) -> Iterator[Unit]:
    from hashattn.integrations.transformers.capture import capturable

    for seed in settings.seeds:
        for tokens in settings.tokens:
            if {"tensors", "perplexity", "fidelity"} & {*settings.parts}:
                pieces = windows(tokenizer, text, tokens, settings.windows, seed=seed)
                depth = len(capturable(model) if settings.layers is None else settings.layers)
                judged = len(entries) + 1
                for part, steps in (("tensors", depth + 1), ("perplexity", judged), ("fidelity", judged)):
                    if part in settings.parts:
                        yield from (Unit(part, tokens, seed, i, steps, ids) for i, ids in enumerate(pieces))
            if "retrieval" in settings.parts:
                for task in settings.tasks:
                    for i in range(settings.questions):
                        # Depths in even steps, so that a picture has something at each.
                        where = {"depth": (i + 0.5) / settings.questions} if task == "needle" else {}
                        question = TASKS[task](tokenizer, text.content, tokens, seed=SEEDS * (seed + 1) + i, **where)
                        steps = 1 + len(retrieval.PROTOCOLS) * len(entries)
                        yield Unit("retrieval", tokens, seed, i, steps, question=question)


def _perplexity(model: PreTrainedModel, unit: Unit, entries: Judged, settings: Settings, tick: Tick) -> list[Record]:
    assert unit.ids is not None
    protocol = "every position" if settings.simulate else "end of window"
    if settings.simulate:
        continuation = perplexity.whole_window(model, unit.ids)
    else:
        continuation = perplexity.end_of_window(model, unit.ids, settings.sparse)
    full = judge(model, continuation)
    tick()
    records = [_record(unit, None, protocol, {"nll": full.nll, "ratio": 1.0})]
    for entry, attn in entries:
        verdict = judge(model, continuation, attn)
        tick()
        values = {"nll": verdict.nll, "ratio": math.exp(verdict.nll - full.nll), **verdict.reads}
        records.append(_record(unit, entry, protocol, values, attn))
    return _above_exact(records, "ratio")


def _fidelity(model: PreTrainedModel, unit: Unit, entries: Judged, settings: Settings, tick: Tick) -> list[Record]:
    assert unit.ids is not None
    continuation = fidelity.own_text(model, unit.ids, settings.decoded)
    records = []
    for entry, attn in [(None, None), *entries]:
        verdict = judge(model, continuation, attn)
        tick()
        records.append(_record(unit, entry, "", {"fidelity": verdict.matched, **verdict.reads}, attn))
    return records


def _retrieval(model: PreTrainedModel, unit: Unit, entries: Judged, settings: Settings, tick: Tick) -> list[Record]:
    assert unit.question is not None
    records: list[Record] = []
    asked = retrieval.continuations(model, unit.question)
    full = judge(model, asked["dense question"])
    tick()
    for protocol, continuation in asked.items():
        mine = [_record(unit, None, protocol, {"nll": full.nll, "correct": int(full.correct)})]
        for entry, attn in entries:
            verdict = judge(model, continuation, attn)
            tick()
            values = {"nll": verdict.nll, "correct": int(verdict.correct), **verdict.reads}
            values["nll_above_full"] = verdict.nll - full.nll
            mine.append(_record(unit, entry, protocol, values, attn))
        records += _above_exact(mine, "nll")
    return records


def _tensors(model: PreTrainedModel, unit: Unit, entries: Judged, settings: Settings, tick: Tick) -> list[Record]:
    from hashattn.integrations.transformers import capture

    assert unit.ids is not None
    ids = tensors.continued(model, unit.ids, settings.decoded, unit.seed)
    captured = capture(model, ids.to(model.device), layers=settings.layers, queries=settings.queries)
    tick()
    entries = [(entry, attn) for entry, attn in entries if not looks_back(attn)]  # the prompt's queries are not kept
    compositions = [(attn, entry.budget) for entry, attn in entries]
    found = tensors.judge_layers(model, captured, compositions, unit.tokens, tick)
    records = []
    for (entry, attn), figures in zip(entries, found, strict=True):
        layers = figures.pop("layers")
        values = {name: value for name, value in figures.items() if value is not None}
        records.append(_record(unit, entry, "", values, attn) | {"layers": layers})
    return records


_MEASURES = {"tensors": _tensors, "perplexity": _perplexity, "fidelity": _fidelity, "retrieval": _retrieval}


def _searching(model: PreTrainedModel, entry: Contender, unit: Unit) -> HashAttention:
    return searching(entry.composition(unit.tokens, seed=unit.seed), model.device)


def _record(
    unit: Unit, entry: Contender | None, protocol: str, values: dict[str, Any], attn: HashAttention | None = None
) -> Record:
    """None is full attention."""
    who: Record = {"contender": FULL, "budget": None, "dense": "", "bits": None}
    if entry is not None:
        bits = attn.encoder.bits if attn is not None and attn.encoder is not None else 0
        who = {"contender": entry.label, "budget": entry.budget, "dense": entry.dense, "bits": bits or None}
    return {**unit.record, "protocol": protocol, **who, "values": values}


def _above_exact(records: list[Record], name: str) -> list[Record]:
    """Add what each has above exact top-k of the same budget and dense layers, on the same window or question."""
    exact = {(r["budget"], r["dense"]): r["values"][name] for r in records if r["contender"] == EXACT}
    for record in records:
        beside = exact.get((record["budget"], record["dense"]))
        if record["contender"] not in (EXACT, FULL) and beside is not None:  # None: a budget of its own
            record["values"][f"{name}_above_exact"] = record["values"][name] - beside
    return records
