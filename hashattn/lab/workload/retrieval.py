"""Questions whose answer stands in a long text: one needle, one of several keys, a sequence to copy."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.lab.workload.prompt import LETTERS, boundary, encode, frame, gap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = (
    "Agnes Bjorn Camille Dmitri Elsa Farid Greta Hiroshi Ingrid Jamal Katya Lionel Mariko Nadia Olaf Priya "
    "Quentin Rashid Sigrid Tomas Ulrich Vera Wendell Ximena Yusuf Zelda Amir Bettina Carlos Dagmar Emeka "
    "Freya"
)
NAMES = tuple(_NAMES.split())
_WORDS = (
    "apple basket candle dolphin engine feather garden hammer island jacket kettle lemon mirror needle orange "
    "pencil quarry ribbon silver tunnel umbrella valley window yellow zebra anchor bottle carpet desert elbow "
    "forest guitar harbor insect jungle kitchen ladder magnet napkin ocean"
)
WORDS = tuple(_WORDS.split())
CUE, COPIED = 6, 8  # words that are repeated, and words that have to follow


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt and its right answer.

    Attributes:
        task: "needle", "multikey" or "copy".
        ids: int64 [1, N], the whole prompt up to where the answer begins.
        asked: the column where the question begins; ids[:, :asked] is the context.
        answer: int64 [1, A], the tokens of the right answer.
        spans: the columns (first, end) of what has to be found.
        depth: where that stands in the text, 0 its start and 1 its end.
    """

    task: str
    ids: Tensor
    asked: int
    answer: Tensor
    spans: tuple[tuple[int, int], ...]
    depth: float


@dataclass(frozen=True)
class _Hidden:
    """What stands in a text, where, which of it is wanted, and how it is asked for."""

    task: str
    facts: Sequence[str]
    depths: Sequence[float]
    wanted: int
    question: str
    start: str  # of the answer
    answer: str  # what then has to be known


def needle(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, *, seed: int, depth: float | None = None
) -> Question:
    """One fact in a long text; `depth` says where, by chance if None.

    Args:
        tokenizer: with its chat template, if it has one.
        text: long enough for the prompt; where it is taken from varies with the seed.
        tokens: length of the prompt, exactly.
        seed: of all that varies.

    Raises:
        ValueError: a depth outside [0, 1], too few tokens, a text that is too short.
    """
    chance = random.Random(f"needle {seed}")
    depth = chance.random() if depth is None else depth
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie between 0 (start of the text) and 1 (its end)")
    (name,), (code,) = _names(chance, 1), _codes(chance, 1)
    hidden = _Hidden("needle", [_fact(name, code)], [depth], 0, *_code_question(name, code))
    return _ask(hidden, tokenizer, text, tokens, chance)


def multikey(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, *, seed: int, keys: int = 8) -> Question:
    """`keys` facts of one kind spread over a long text, one of which is asked for; otherwise as :func:`needle`.

    Raises:
        ValueError: `keys` that are too few or too many; likewise.
    """
    if not 2 <= keys <= len(NAMES):
        raise ValueError(f"keys must be from 2 to {len(NAMES)}, got {keys}")
    chance = random.Random(f"multikey {seed}")
    names, codes, wanted = _names(chance, keys), _codes(chance, keys), chance.randrange(keys)
    facts = [_fact(name, code) for name, code in zip(names, codes, strict=True)]
    depths = [(i + 0.5) / keys for i in range(keys)]
    asked = _code_question(names[wanted], codes[wanted])
    return _ask(_Hidden("multikey", facts, depths, wanted, *asked), tokenizer, text, tokens, chance)


def copy(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, *, seed: int) -> Question:
    """A random sequence of words in a long text, whose beginning is repeated and has to be continued (induction)."""
    chance = random.Random(f"copy {seed}")
    words = chance.sample(WORDS, CUE + COPIED)
    start = "The list of words is: " + " ".join(words[:CUE])
    follows = " " + " ".join(words[CUE:])
    question = "What is the list of words in the text? Repeat it."
    hidden = _Hidden("copy", [f"{start}{follows}."], [chance.random()], 0, question, start, follows)
    return _ask(hidden, tokenizer, text, tokens, chance)


TASKS: dict[str, Callable[..., Question]] = {"needle": needle, "multikey": multikey, "copy": copy}


def _fact(name: str, code: str) -> str:
    return f"The access code of {name} is {code}."


def _code_question(name: str, code: str) -> tuple[str, str, str]:
    """The question, how its answer starts, and what then has to be known."""
    return f"What is the access code of {name}?", f"The access code of {name} is", f" {code}"


def _names(chance: random.Random, n: int) -> list[str]:
    return chance.sample(NAMES, n)


def _codes(chance: random.Random, n: int) -> list[str]:
    return [str(number) for number in chance.sample(range(1000, 10000), n)]


def _ask(hidden: _Hidden, tokenizer: Any, text: str, tokens: int, chance: random.Random) -> Question:
    """The prompt: text with facts, question, the start of the answer. Pieces are tokenized one by one."""
    opening, closing = frame(tokenizer, hidden.question)
    closing += encode(tokenizer, hidden.start if tokenizer.chat_template else f" {hidden.start}")
    inserted = [encode(tokenizer, fact) for fact in hidden.facts]
    room = tokens - len(opening) - len(closing) - sum(map(len, inserted))
    if room < 1:
        raise ValueError(f"tokens={tokens} leaves no room for the text: use at least {tokens - room + 64}")
    passage, length = _passage(tokenizer, text, room, chance)
    body, spans, left, before, glue = [], [], room, 0, ""
    for fact, depth in zip(inserted, hidden.depths, strict=True):
        cut = max(before, boundary(passage[:length], depth))
        space = gap(passage[:cut])
        piece = encode(tokenizer, glue + passage[before:cut].rstrip() + space if cut > before else glue)[:left]
        body += piece
        spans.append((len(opening) + len(body), len(opening) + len(body) + len(fact)))
        body += fact
        left, before, glue = left - len(piece), cut, space
    body += encode(tokenizer, glue + passage[before:])[:left]
    ids = torch.tensor([opening + body + closing])
    if ids.shape[1] != tokens:
        raise _too_short(tokens, room - tokens + ids.shape[1], room)
    told, wanted = torch.tensor([encode(tokenizer, hidden.answer)]), hidden.wanted
    return Question(hidden.task, ids, len(opening) + len(body), told, (spans[wanted],), hidden.depths[wanted])


def _passage(tokenizer: Any, text: str, room: int, chance: random.Random) -> tuple[str, int]:
    """A piece of the text that starts at a random paragraph, and how many of its letters make `room` tokens."""
    latest = max(0, len(text) - LETTERS // 2 * room)
    start = chance.randint(0, latest)
    paragraph = re.compile(r"\n\s*\n|\Z").search(text, start)
    if start and paragraph is not None and paragraph.end() < latest:
        start = paragraph.end()
    for first in (start, 0):
        passage = text[first : first + LETTERS * room]
        ids = encode(tokenizer, passage)
        if len(ids) >= room:
            return passage, len(tokenizer.decode(ids[:room], clean_up_tokenization_spaces=False))
    raise _too_short(room, len(ids), room)


def _too_short(tokens: int, found: int, room: int) -> ValueError:
    return ValueError(f"the text has {found} tokens, but {room} are needed: give a longer text, or fewer tokens")
