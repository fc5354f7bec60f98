"""Answers to a benchmark's questions, written greedily by full and by sparse attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.core.errors import refusals
from hashattn.core.progress import bar
from hashattn.lab.evaluation.benchmarks import Asked
from hashattn.lab.evaluation.contenders import FULL, Contender, searching
from hashattn.lab.evaluation.continuation import looks_back, reads_of
from hashattn.lab.workload.model import cache_argument
from hashattn.lab.workload.prefill import ends_of, positions_of, prefill
from hashattn.lab.workload.prompt import beginning, encode, frame

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    entries: Sequence[Contender],
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Ask every question of full attention and of every contender; prompts are prefilled densely, once.

    Returns:
        Records like those of :func:`hashattn.lab.evaluation.run.run`, with the answers.

    Raises:
        ValueError: a model whose context is too short, or that cannot be attached; before anything is asked.
    """
    records: list[dict[str, Any]] = []
    with refusals(ValueError):
        prompts = [prompt_ids(model, tokenizer, question) for question in asked]
        for judged in entries:
            with judged.composition(min(ids.shape[1] for ids in prompts)).attach(model):
                pass
    total = len(asked) * (1 + len(entries))
    with bar("hf", "an evaluation", total=total, unit="answer", shown=progress) as shown:
        for number, (question, ids) in enumerate(zip(asked, prompts, strict=True)):
            shown.set_description(f"{question.benchmark} {question.task}")
            cache = prefill(model, ids[:, :-1])
            said: dict[str, Any] = {"part": "benchmarks", "task": f"{question.benchmark} {question.task}"}
            said |= {"unit": number, "question": question.name, "tokens": None, "length": ids.shape[1]}
            said |= {"protocol": "", "seed": 0}
            for entry in (None, *entries):
                answer, reads = _answer(model, tokenizer, ids, cache, question.tokens, entry)
                who: dict[str, Any] = {"contender": FULL, "budget": None, "dense": "", "bits": None}
                if entry is not None:
                    who = {
                        "contender": entry.label,
                        "budget": entry.budget,
                        "dense": entry.dense,
                        "bits": None,
                    }
                records.append(said | who | {"answer": answer, "values": question.score(answer) | reads})
                shown.update()
    return records


def prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Asked) -> Tensor:
    """int64 [1, N]: a prompt in its chat template, if there is one. Too long a prompt loses its middle, as LongBench's.

    Raises:
        ValueError: a model whose context is shorter than the answer.
    """
    opening, closing = beginning(tokenizer), list[int]()
    if question.chat and tokenizer.chat_template:
        opening, _ = frame(tokenizer, "")
        closing = encode(tokenizer, _turn_end(tokenizer))
    body = encode(tokenizer, question.prompt)
    limit = positions_of(model)
    room = None if limit is None else limit - question.tokens - len(opening) - len(closing)
    if room is not None and room < 2:
        raise ValueError(f"the model's {limit} positions leave no room for a prompt beside {question.tokens} tokens")
    if room is not None and len(body) > room:
        body = body[: room // 2] + body[len(body) - (room - room // 2) :]
    return torch.tensor([opening + body + closing])


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template puts behind a user's turn."""
    mark = "<<prompt>>"
    message = [{"role": "user", "content": mark}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)).split(mark)[1]


@torch.inference_mode()
def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    cache: DynamicCache,
    tokens: int,
    entry: Contender | None,
) -> tuple[str, dict[str, float]]:
    """Greedy answer over a copy of a cache of all but the prompt's last token, and what was read a step."""
    from transformers import GenerationConfig

    ids = ids.to(model.device)
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=ends_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )

    def write(cache: DynamicCache) -> str:
        given = {cache_argument(model): cache, "attention_mask": torch.ones_like(ids)}
        out = model.generate(ids, generation_config=config, **given)  # type: ignore[operator]
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    if entry is None:
        return write(copy.deepcopy(cache)), {}
    attn = searching(entry.composition(ids.shape[1]), model.device)
    with attn.attach(model) as handle:
        own = prefill(model, ids[:, :-1]) if looks_back(attn) else copy.deepcopy(cache)
        handle.reset_report()
        answer, report = write(own), handle.report()
    return answer, reads_of(report)
