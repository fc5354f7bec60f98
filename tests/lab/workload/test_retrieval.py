"""Questions: as long as asked, with what has to be found whole and where it should be, varied by their seed."""

from __future__ import annotations

import pytest
import torch

from hashattn.lab.workload.assets import SHAKESPEARE, fetch
from hashattn.lab.workload.retrieval import NAMES, TASKS, multikey, needle
from tests.lab.demo.test_story import Letters


@pytest.fixture(scope="module")
def text() -> str:
    return fetch(SHAKESPEARE).read_text(encoding="ascii")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [700, 3000])
def test_length_parts_and_answer(task: str, tokens: int, text: str) -> None:
    question = TASKS[task](Letters(), text, tokens, seed=3)
    assert question.ids.shape == (1, tokens) and question.ids.dtype == question.answer.dtype == torch.int64
    letters = "".join(map(chr, question.ids[0].tolist()))
    answer = "".join(map(chr, question.answer[0].tolist()))
    ((first, end),) = question.spans
    assert question.task == task and end <= question.asked < tokens
    assert letters[question.asked :].startswith("\n\nQuestion: What is the ")
    # The prompt ends as what has to be found does, and goes on with the answer.
    start = letters[letters.rindex("Answer: ") + len("Answer: ") :]
    assert letters[first:end] == f"{start}{answer}."
    assert abs(first / tokens - question.depth) < 0.2 or tokens == 700


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_everything(task: str, text: str) -> None:
    one, again, other = (TASKS[task](Letters(), text, 1000, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.ids, again.ids) and torch.equal(one.answer, again.answer) and one.spans == again.spans
    assert not torch.equal(one.answer, other.answer)
    assert (one.ids != other.ids).float().mean() > 0.5  # the text is another as well


def test_all_keys_are_there_and_only_one_is_asked_for(text: str) -> None:
    question = multikey(Letters(), text, 4000, seed=0, keys=8)
    letters = "".join(map(chr, question.ids[0].tolist()))
    context, asked = letters[: question.asked], letters[question.asked :]
    assert sum(f"The access code of {name} is " in context for name in NAMES) == 8
    assert sum(name in asked for name in NAMES) == 1


def test_a_needle_stands_where_it_is_asked_to(text: str) -> None:
    firsts = [needle(Letters(), text, 5000, seed=1, depth=depth).spans[0][0] / 5000 for depth in (0.0, 0.5, 1.0)]
    assert firsts == pytest.approx([0.0, 0.5, 0.97], abs=0.08)


def test_real_tokens_too(smollm2, text: str) -> None:
    _, tokenizer = smollm2
    for task in TASKS.values():
        question = task(tokenizer, text, 900, seed=5)
        ((first, end),) = question.spans
        found = tokenizer.decode(question.ids[0, first:end])
        assert question.ids.shape == (1, 900)
        assert found.endswith(tokenizer.decode(question.answer[0]) + ".")
        assert "<|im_start|>assistant\n" in tokenizer.decode(question.ids[0, question.asked :])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 100}, r"tokens=100 leaves no room for the text: use at least \d+"),
        ({"text": "Short. " * 9}, "the text has 63 tokens, but [0-9]+ are needed"),
        ({"depth": 1.5}, r"depth=1.5 must lie between 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: dict, message: str, text: str) -> None:
    given = {"text": text, "tokens": 900} | arguments
    with pytest.raises(ValueError, match=message):
        needle(Letters(), given.pop("text"), given.pop("tokens"), seed=0, **given)


def test_a_number_of_keys_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="keys must be from 2 to 32, got 1"):
        multikey(Letters(), text, 1000, seed=0, keys=1)
