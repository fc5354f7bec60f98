"""The demo's run: one dense prefill, then the same question answered by full attention and by a preset."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from hashattn.attention import HashAttention
from hashattn.core.errors import refusals
from hashattn.core.progress import bar
from hashattn.encoders import AsymmetricHash
from hashattn.fitted.saving import from_pretrained, shipped
from hashattn.lab.demo.contest import NEW_TOKENS, Contender, Contest
from hashattn.lab.demo.reads import Reads
from hashattn.lab.demo.story import ANSWER, FACT, QUESTION, build_story
from hashattn.lab.evaluation.contenders import searching
from hashattn.lab.workload.model import check_source, load
from hashattn.lab.workload.prefill import positions_of, prefill
from hashattn.lab.workload.texts import read_text
from hashattn.ops import compiled
from hashattn.presets import budget_options
from hashattn.presets.parsing import parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 8000
OWN_ENCODERS = {"dashkv": "smollm2-135m", "dashkv_fast": "smollm2-135m-fast"}  # of the model that comes with the demo


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
    reads: Reads

    def as_json(self) -> dict[str, Any]:
        """The same as plain types."""
        reads = self.reads
        plain = {field: value for field, value in asdict(self).items() if field != "reads"}
        plain |= {"fact_over_others": reads.over_others, "fact_over_others_searching": reads.over_others_searching}
        return plain | {"reads": reads.counts}


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

    if ids.device.type == "cpu" and network.dtype in compiled.DTYPES and not compiled.why_not_here():
        from hashattn.ops.compiled.step import compile_for  # imports Numba

        say("compiling the step (some seconds, the first time) ...")
        compile_for(network.dtype)
    began = time.perf_counter()
    with bar("hf", "the demo", total=tokens - 1, desc="reading the text", unit="token", shown=progress) as shown:
        cache = prefill(network, ids[:, :-1], tick=shown.update)
    seconds = time.perf_counter() - began
    contest = Contest(network, tokenizer, cache, ids, None if own else ANSWER)
    contenders, report, remarks = contest.run(preset, attn)
    counts = contest.read_keys(attn, contenders[-1].answer)
    selector = attn.selector
    forced = (0, 0) if selector is None else (selector.sinks, selector.recents)
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
        layers=str(report),
        notes=(*notes, *remarks),
        reads=Reads(counts, tokens, story.fact_span, *forced, report.searching_layers),
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    pass
