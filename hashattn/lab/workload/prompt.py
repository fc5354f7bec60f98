"""Prompts around a long text: what stands before and after it, and where a fact may be put into it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where a fact may go, best first: between paragraphs, between sentences, between words.
_BOUNDARIES = (r"[.!?\]]\s*\n\s*\n", r"[.!?](?:\s+|\Z)", r"\s+")
_MARK = "<<story>>"
# No common tokenizer packs more characters into a token on average; the rest of a library is not looked at.
LETTERS = 16


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, without those that begin or end one."""
    # verbose=False: a text longer than the model's context is the point here, not a mistake.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that begins every text, if the tokenizer itself puts it there."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []


def frame(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[list[int], list[int]]:
    """The tokens before the text and after it: chat template, question, and where the answer starts."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": f"{_MARK}\n\n{question}"}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        opening, closing = str(prompt).split(_MARK)
        return encode(tokenizer, opening), encode(tokenizer, closing)
    return beginning(tokenizer), encode(tokenizer, f"\n\nQuestion: {question}\nAnswer:")


def boundary(text: str, depth: float) -> int:
    """The best kind of boundary near `depth` of the text (0 its start, 1 its end), and of that kind the nearest."""
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


def gap(text: str) -> str:
    """The white space at the end of a text, which then also follows what is put there; an empty line if none."""
    found = re.search(r"\s*\Z", text)
    return (found.group() if found else "") or "\n\n"
