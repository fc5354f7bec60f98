"""LongBench and RULER, from files that are on disk: questions, prompts, scores."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashattn.core.json_files import parse_json

_SHORT = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)
_BRIEFLY = (
    "Answer the question as concisely as you can, using a single phrase or sentence if possible. If the question "
    'cannot be answered based on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.'
)
# LongBench's QA tasks in English: prompt and length of the answer, as its authors have them.
LONGBENCH = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}"
        "\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do "
        "not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
    ),
    "qasper": (
        "You are given a scientific article and a question. " + _BRIEFLY + "\n\nArticle: {context}\n\n Answer the "
        "question based on the above article as"
        + _BRIEFLY.removeprefix("Answer the question as")
        + "\n\nQuestion: {input}\n\nAnswer:",
        128,
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
    ),
    "hotpotqa": (_SHORT, 32),
    "2wikimqa": (_SHORT, 32),
    "musique": (_SHORT, 32),
}
RULER_TOKENS = 128  # of an answer


@dataclass(frozen=True)
class Asked:
    """One question of a benchmark.

    Attributes:
        benchmark: "longbench" or "ruler".
        task: the dataset, or the file's name.
        name: of the question.
        prompt: text to be answered.
        chat: whether the prompt is a user's turn, which a chat template goes around. RULER's files hold whole prompts.
        answers: right ones.
        tokens: that an answer may take.
    """

    benchmark: str
    task: str
    name: str
    prompt: str
    chat: bool
    answers: tuple[str, ...]
    tokens: int

    def score(self, answer: str) -> dict[str, float]:
        """f1 (LongBench's QA tasks: the best over the right answers) or match (RULER), from 0 to 1."""
        if self.benchmark == "longbench":
            return {"f1": max(qa_f1(answer, right) for right in self.answers)}
        found = [right.casefold() in answer.casefold() for right in self.answers]
        # RULER's QA tasks list other wordings of one answer, its other tasks everything that has to be found.
        return {"match": float(any(found)) if self.task.startswith("qa") else sum(found) / len(found)}


def read_longbench(path: str | Path) -> list[Asked]:
    """The questions of a LongBench file (Bai et al., arXiv 2308.14508): JSON lines of a QA task.

    Raises:
        ValueError: a file that cannot be read or is of another format; line and field are named.
    """
    asked = []
    for place, row in _lines(path):
        dataset = str(_field(row, "dataset", str, place)).removesuffix("_e")
        if dataset not in LONGBENCH:
            raise ValueError(f"{place}: field dataset must be one of {', '.join(LONGBENCH)}, got {dataset!r}")
        prompt, tokens = LONGBENCH[dataset]
        said = {name: _field(row, name, str, place) for name in ("context", "input", "_id")}
        answers = _strings(row, "answers", place)
        # One by one: a context may hold braces.
        text = prompt.replace("{input}", said["input"]).replace("{context}", said["context"])
        asked.append(Asked("longbench", dataset, said["_id"], text, True, answers, tokens))
    return asked


def read_ruler(path: str | Path) -> list[Asked]:
    """The questions of a RULER file (Hsieh et al., arXiv 2404.06654): JSON lines with whole prompts.

    The task is the file's name, or its folder's where that is a split's ("validation.jsonl").

    Raises:
        ValueError: a file that cannot be read or is of another format; line and field are named.
    """
    path = Path(path)
    task = path.parent.name if path.stem in ("validation", "test", "train") else path.stem
    asked = []
    for place, row in _lines(path):
        prompt, index = _field(row, "input", str, place), _field(row, "index", int, place)
        answers = _strings(row, "outputs", place)
        _field(row, "length", int, place)
        asked.append(Asked("ruler", task, str(index), prompt, False, answers, RULER_TOKENS))
    return asked


def qa_f1(answer: str, right: str) -> float:
    """F1 of the words in common, without case, punctuation and articles, as in SQuAD and LongBench."""
    found, wanted = _words(answer), _words(right)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line for messages, the object) of each line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON's strings may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rows = [(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} is empty: a JSON object a line was expected")
    for place, line in rows:
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{place}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a JSON object was expected, got {type(row).__name__}")
        yield place, row


def _field(row: dict[str, Any], name: str, kind: type, place: str) -> Any:
    if name not in row:
        raise ValueError(f"{place}: field {name} is missing; there are {', '.join(row) or 'none'}")
    if not isinstance(row[name], kind) or isinstance(row[name], bool):
        raise ValueError(f"{place}: field {name} must be of type {kind.__name__}, got {row[name]!r:.60}")
    return row[name]


def _strings(row: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    values: Sequence[Any] = _field(row, name, list, place)
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{place}: field {name} must be a list of strings, at least one, got {values!r:.60}")
    return tuple(values)
