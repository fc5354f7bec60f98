"""A long text with one fact hidden in it and a question about the fact at its end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Chosen by trial on one text: SmolLM2-135M with full attention answers at 1K, 2K and 4K tokens at the depths tried
# (0.1, 0.5, 0.9); at 8K, the end of its context, only at 0.5.
FACT = "The secret number of the lighthouse keeper is 7481."
QUESTION = "What is the secret number of the lighthouse keeper? Answer with the number only."
ANSWER = "7481"

# Where a fact may go, best first: between paragraphs, between sentences, between words.
_BOUNDARIES = (r"[.!?\]]\s*\n\s*\n", r"[.!?](?:\s+|\Z)", r"\s+")
_MARK = "<<story>>"


@dataclass(frozen=True)
class Story:
    """A prompt: input_ids [1, N], and the token positions [first, end) of its fact, if it holds one."""

    input_ids: torch.Tensor
    fact_span: tuple[int, int] | None


def build_story(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tokens: int,
    fact: str | None = FACT,
    question: str = QUESTION,
    depth: float = 0.5,
) -> Story:
    """Cut `text` so that the whole prompt is `tokens` long (shorter only if the text ends first).

    The fact goes in at `depth` (0 is the start of the text, 1 its end), on the nearest paragraph or sentence boundary;
    fact=None inserts nothing. The pieces are tokenized one by one, so that the fact's positions are known.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie between 0 (start of the text) and 1 (its end)")
    opening, closing = _frame(tokenizer, question)
    inserted = _encode(tokenizer, fact) if fact else []
    room = tokens - len(opening) - len(closing) - len(inserted)
    if room < 1:
        raise ValueError(f"tokens={tokens} leaves no room for the text: use at least {tokens - room + 64}")
    # No common tokenizer packs more than 16 characters into a token on average; the rest of a library is not looked at.
    text = text[: 16 * room]
    if not fact:
        body, span = _encode(tokenizer, text)[:room], None
    else:
        used = tokenizer.decode(_encode(tokenizer, text)[:room], clean_up_tokenization_spaces=False)
        cut = _boundary(text[: len(used)], depth)
        gap = re.search(r"\s*\Z", text[:cut])
        glue = (gap.group() if gap else "") or "\n\n"
        before = _encode(tokenizer, text[:cut].rstrip() + glue if cut else "")[:room]
        first = len(opening) + len(before)
        span = first, first + len(inserted)
        body = before + inserted + _encode(tokenizer, glue + text[cut:])[: room - len(before)]
    return Story(torch.tensor([opening + body + closing]), span)


def contains_answer(text: str, expected: str) -> bool:
    """Whether the expected answer occurs in the text, whatever its case."""
    return expected.casefold() in text.casefold()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is the point here, not a mistake.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _frame(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[list[int], list[int]]:
    """The tokens before the text and after it: chat template, question, and where the answer starts."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": f"{_MARK}\n\n{question}"}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        opening, closing = str(prompt).split(_MARK)
        return _encode(tokenizer, opening), _encode(tokenizer, closing)
    bos = tokenizer.bos_token_id
    starts = tokenizer("")["input_ids"][:1] == [bos]  # only if the tokenizer itself would put it there
    return [bos] if starts else [], _encode(tokenizer, f"\n\nQuestion: {question}\nAnswer:")


def _boundary(text: str, depth: float) -> int:
    """The best kind of boundary near `depth` of the text, and of that kind the nearest."""
    target = round(depth * len(text))
    if target == 0:
        return 0
    reach = max(200, len(text) // 50)
    low = max(0, target - reach)
    for pattern in _BOUNDARIES:
        ends = [low + match.end() for match in re.finditer(pattern, text[low : target + reach])]
        if ends:
            return min(ends, key=lambda end: abs(end - target))
    return target
