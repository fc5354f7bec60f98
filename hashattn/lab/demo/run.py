"""The demo's run: one dense prefill, then the same question answered by full attention and by a preset."""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.core.errors import refusals
from hashattn.core.progress import bar
from hashattn.encoders import AsymmetricHash
from hashattn.fitted.saving import from_pretrained, shipped
from hashattn.lab.demo.story import ANSWER, FACT, QUESTION, build_story, contains_answer
from hashattn.lab.evaluation.contenders import searching
from hashattn.lab.workload.model import cache_argument, check_source, load
from hashattn.lab.workload.prefill import ends_of, positions_of, prefill
from hashattn.lab.workload.texts import read_text
from hashattn.presets import budget_options
from hashattn.presets.parsing import parse

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 24
CONTEXT = 8000
OWN_ENCODERS = {"dashkv": "smollm2-135m", "dashkv_fast": "smollm2-135m-fast"}  # of the model that comes with the demo


@dataclass(frozen=True)
class Contender:
    """What one way of attending did with the question."""

    name: str
    answer: str
    correct: bool | None  # None if nobody knows the answer
    tokens_per_second: float
    indexing_seconds: float  # once, before its first token
    keys_read: float = 1.0  # share of the visible keys
    bytes_per_step: float = 0.0
    code_bytes: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True)
class Result:
    """Everything the demo measured."""

    model: str
    preset: str
    composition: str
    tokens: int
    fact_span: tuple[int, int] | None
    question: str
    prefill_seconds: float
    contenders: tuple[Contender, ...]
    agree: bool
    layers: str  # what ran where
    notes: tuple[str, ...]
    reads: list[list[int]]  # [layers][positions]: how often query heads read each position

    def as_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return asdict(self)


def run_demo(
    *,
    model: str | None = None,
    preset: str = "dashkv_fast",
    text: str | None = None,
    question: str | None = None,
    context: int | None = None,
    budget: float | None = None,
    encoder: str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Result:
    """Run the demo; see `hashattn demo --help` for the arguments.

    Raises:
        ValueError: an argument that cannot be used; before anything is loaded where possible.
    """
    say = _say if progress else _say_nothing
    with refusals():
        name, options = parse(preset)
        options |= encoder_options(preset, model, encoder)
        if isinstance(options.get("pretrained"), str):
            options["pretrained"] = from_pretrained(options["pretrained"])  # once for all that is built
        first = composition(name, options, budget, CONTEXT)  # refuses a wrong budget at once
        if first.encoder is not None:
            first.encoder.check_fitted()
        check_source(model)
        passage = read_text(text)
        say(f"loading {model or 'SmolLM2-135M-Instruct'} on {device} ...")
        network, tokenizer = load(model, device=device)
        own, asked = question is not None, QUESTION if question is None else question
        wanted = _tokens(network, context)
        story = build_story(tokenizer, passage.content, tokens=wanted, fact=None if own else FACT, question=asked)
        ids = story.input_ids.to(device)
        tokens = ids.shape[1]
        attn = composition(name, options, budget, tokens)
        attn = searching(attn, torch.device(device))
        for each in (HashAttention.from_preset("full"), attn):
            with each.attach(network):  # refuses a model that it cannot serve now, not after the text is read
                pass
    notes = []
    if context is not None and tokens < context:
        notes.append(f"{passage.name} ends after {tokens:,} tokens, where {context:,} were asked for")
    say(f"{tokens:,} tokens" + ("" if own else f', with one fact in the middle: "{FACT}"'))

    began = time.perf_counter()
    with bar("hf", "the demo", total=tokens - 1, desc="reading the text", unit="token", shown=progress) as shown:
        cache = prefill(network, ids[:, :-1], tick=shown.update)
    seconds = time.perf_counter() - began
    known = None if own else ANSWER
    full = answer(network, tokenizer, ids, copy.deepcopy(cache), "full attention", known)
    own_cache = answer_with(HashAttention.from_preset("full"), network, tokenizer, ids, cache, "full, our cache", known)
    hashed = answer_with(attn, network, tokenizer, ids, cache, preset, known)
    notes += [] if hashed[2] is None else [hashed[2]]
    contenders = (_with_bytes(full, own_cache[0]), own_cache[0], hashed[0])
    return Result(
        model=model or "SmolLM2-135M-Instruct",
        preset=preset,
        composition=repr(attn),
        tokens=tokens,
        fact_span=story.fact_span,
        question=asked,
        prefill_seconds=seconds,
        contenders=contenders,
        agree=contenders[0].answer == contenders[-1].answer,
        layers=hashed[1],
        notes=tuple(notes),
        reads=hashed[3],
    )


def composition(name: str, options: Mapping[str, Any], budget: float | None, tokens: int) -> HashAttention:
    """A preset with its options and a share of so many keys, or its own budget for None."""
    return HashAttention.from_preset(name, **{**budget_options(name, budget, tokens, options), **options})


def _tokens(network: PreTrainedModel, context: int | None) -> int:
    """The length of the prompt: `context`, if that and the answer are within the model's positions.

    Raises:
        ValueError: they are not.
    """
    limit = positions_of(network)
    if context is None:
        return CONTEXT if limit is None else min(CONTEXT, limit - 2 * NEW_TOKENS)
    most = context if limit is None else limit - NEW_TOKENS
    if not 1 <= context <= most:
        raise ValueError(f"context must be from 1 to {most} for this model ({limit} positions), got {context}")
    return context


def encoder_options(preset: str, model: str | None, encoder: str | None) -> dict[str, Any]:
    """The preset's option for fitted encoders: those named, else those that come with the library for its own model.

    Args:
        preset: as :func:`hashattn.presets.parsing.parse` takes it. With options of its own it gets none unasked.
        encoder: a folder, a name, "none" for unfitted ones, or None.

    Raises:
        ValueError: encoders that are not there, or that the preset does not take.
    """
    name, options = parse(preset)
    if encoder == "none":
        return {}
    if encoder is None:
        own = OWN_ENCODERS.get(name, OWN_ENCODERS["dashkv"])
        takes = isinstance(HashAttention.from_preset(name).encoder, AsymmetricHash)
        if model is not None or not takes or options or own not in shipped():
            return {}
        encoder = own
    HashAttention.from_preset(name, **options, pretrained=encoder)
    return {"pretrained": encoder}


def answer(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    cache: DynamicCache,
    name: str,
    known: str | None,
) -> Contender:
    """Greedy answer over a prefilled cache; every attended token is timed. The cache is used up."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        ticks: list[float] = []  # noqa: RUF012 (one instance)

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.ticks.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    clock = Clock()
    ends = ends_of(network, tokenizer)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=tokenizer.pad_token_id
    )
    began = time.perf_counter()
    with torch.inference_mode():
        given = {cache_argument(network): cache, "attention_mask": torch.ones_like(ids), "generation_config": config}
        clocks = StoppingCriteriaList([clock])
        out = network.generate(ids, stopping_criteria=clocks, **given)  # type: ignore[operator]  # an untyped mixin
    new: list[int] = out[0, ids.shape[1] :].tolist()
    cut = next((i for i, token in enumerate(new) if token in ends), len(new))
    text = str(tokenizer.decode(new[:cut], skip_special_tokens=True)).strip()
    steps = [b - a for a, b in itertools.pairwise(clock.ticks)]
    pace = statistics.median(steps)
    correct = contains_answer(text, known) if known else None
    return Contender(name, text, correct, 1 / pace, max(0.0, clock.ticks[0] - began - pace))


def answer_with(
    attn: HashAttention,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    cache: DynamicCache,
    name: str,
    known: str | None,
) -> tuple[Contender, str, str | None, list[list[int]]]:
    """The same with a composition attached: the contender, what ran where, a remark, and which keys were read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attn.attach(network) as handle:
            contender = answer(network, tokenizer, ids, copy.deepcopy(cache), name, known)
            report = handle.report()
        with attn.attach(network, trace=True) as handle:  # once more for the picture: counting reads takes time
            answer(network, tokenizer, ids, copy.deepcopy(cache), name, known)
            reads = handle.reads().tolist()
    seen = replace(contender, keys_read=report.keys_read, bytes_per_step=report.bytes_per_step)
    seen = replace(seen, code_bytes=report.code_bytes, kv_bytes=report.kv_bytes)
    note = next((str(w.message) for w in caught if issubclass(w.category, UserWarning)), None)
    return seen, str(report), note, reads


def _with_bytes(plain: Contender, measured: Contender) -> Contender:
    """The unattached model reads what full attention reads; it has no report of its own."""
    return replace(plain, bytes_per_step=measured.bytes_per_step, kv_bytes=measured.kv_bytes)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    pass
