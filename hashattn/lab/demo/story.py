"""A long text with one fact hidden in it and a question about the fact at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hashattn.lab.workload.prompt import LETTERS, boundary, encode, frame, gap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Chosen by trial on one text: SmolLM2-135M with full attention answers at 1K, 2K and 4K tokens at the depths tried
# (0.1, 0.5, 0.9); at 8K, the end of its context, only at 0.5.
FACT = "The secret number of the lighthouse keeper is 7481."
QUESTION = "What is the secret number of the lighthouse keeper? Answer with the number only."
ANSWER = "7481"


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
    opening, closing = frame(tokenizer, question)
    inserted = encode(tokenizer, fact) if fact else []
    room = tokens - len(opening) - len(closing) - len(inserted)
    if room < 1:
        raise ValueError(f"tokens={tokens} leaves no room for the text: use at least {tokens - room + 64}")
    text = text[: LETTERS * room]
    if not fact:
        body, span = encode(tokenizer, text)[:room], None
    else:
        used = tokenizer.decode(encode(tokenizer, text)[:room], clean_up_tokenization_spaces=False)
        cut = boundary(text[: len(used)], depth)
        glue = gap(text[:cut])
        before = encode(tokenizer, text[:cut].rstrip() + glue if cut else "")[:room]
        first = len(opening) + len(before)
        span = first, first + len(inserted)
        body = before + inserted + encode(tokenizer, glue + text[cut:])[: room - len(before)]
    return Story(torch.tensor([opening + body + closing]), span)


def contains_answer(text: str, expected: str) -> bool:
    """Whether the expected answer occurs in the text, whatever its case."""
    return expected.casefold() in text.casefold()
