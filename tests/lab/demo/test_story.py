"""Stories: as long as asked, with the fact whole and where it was asked for, the question last."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hashattn.lab.demo.story import ANSWER, FACT, QUESTION, build_story, contains_answer
from hashattn.lab.workload.assets import SHAKESPEARE, fetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Smol = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def text() -> str:
    return fetch(SHAKESPEARE).read_text(encoding="ascii")


class Letters(SimpleNamespace):
    """A tokenizer without a chat template: one token a letter, after one that begins the text."""

    chat_template = None
    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("tokens", [100, 1000, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_length_fact_and_depth(smollm2: Smol, text: str, tokens: int, depth: float) -> None:
    _, tokenizer = smollm2
    story = build_story(tokenizer, text, tokens=tokens, depth=depth)
    assert story.input_ids.shape == (1, tokens) and story.input_ids.dtype == torch.int64
    assert story.fact_span is not None
    first, end = story.fact_span
    ids = story.input_ids[0].tolist()
    assert tokenizer.decode(ids[first:end]) == FACT
    assert tokenizer.decode(ids[:first]).rstrip()[-1] in (
        ".!?]" if depth else "r"
    )  # a sentence's end, or the template's "user"
    if tokens > 100:
        assert first / tokens == pytest.approx(depth, abs=0.08)
    assert tokenizer.decode(ids).endswith(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")


def test_without_a_fact_the_text_is_as_it_was(smollm2: Smol, text: str) -> None:
    _, tokenizer = smollm2
    story = build_story(tokenizer, text, tokens=600, fact=None, question="Who is the king?")
    assert story.fact_span is None and story.input_ids.shape == (1, 600)
    _, after = tokenizer.decode(story.input_ids[0]).split("user\n")
    body, _ = after.split("\n\nWho is the king?")
    assert text.startswith(body)


def test_a_short_text_makes_a_shorter_story(smollm2: Smol) -> None:
    _, tokenizer = smollm2
    story = build_story(tokenizer, "Once upon a time. The end.", tokens=1000)
    assert story.input_ids.shape[1] < 100
    assert FACT in tokenizer.decode(story.input_ids[0])


def test_without_a_chat_template_the_question_is_spelled_out() -> None:
    story = build_story(Letters(), "Once upon. A time. " * 9, tokens=120, fact="Sea.", question="Q?")  # type: ignore[arg-type]
    ids = story.input_ids[0].tolist()
    assert ids[0] == 0 and len(ids) == 120
    prompt = Letters().decode(ids[1:])
    assert prompt.endswith("\n\nQuestion: Q?\nAnswer:")
    assert story.fact_span is not None
    first, end = story.fact_span
    assert prompt[first - 1 : end - 1] == "Sea." and prompt[: first - 1].endswith(". ")


@pytest.mark.parametrize("depth", [-0.1, 1.5])
def test_a_depth_outside_the_text_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match=f"depth={depth} must lie between 0"):
        build_story(Letters(), "text", tokens=1000, depth=depth)  # type: ignore[arg-type]


def test_too_few_tokens_are_refused_with_a_number_that_works() -> None:
    with pytest.raises(ValueError, match=r"tokens=20 leaves no room .* use at least (\d+)") as error:
        build_story(Letters(), "text " * 99, tokens=20)  # type: ignore[arg-type]
    enough = int(str(error.value).split()[-1])
    assert build_story(Letters(), "text " * 99, tokens=enough).input_ids.shape == (1, enough)  # type: ignore[arg-type]


def test_contains_answer_ignores_case() -> None:
    assert contains_answer("It is the BLUE Teapot.", "blue teapot")
    assert not contains_answer("It is 748.", ANSWER)


def test_the_model_answers_with_full_attention(smollm2: Smol, text: str) -> None:
    model, tokenizer = smollm2
    story = build_story(tokenizer, text, tokens=1024)
    out = model.generate(
        story.input_ids, attention_mask=torch.ones_like(story.input_ids), max_new_tokens=16, do_sample=False
    )  # type: ignore[operator]
    assert contains_answer(tokenizer.decode(out[0, 1024:]), ANSWER)
