"""LongBench and RULER files: read, asked, scored, and refused where they are not what they should be."""

from __future__ import annotations

import json

import pytest

from hashattn.lab.evaluation.answers import prompt_ids, run
from hashattn.lab.evaluation.benchmarks import Asked, qa_f1, read_longbench, read_ruler
from hashattn.lab.evaluation.contenders import FULL, contenders
from tests.lab.evaluation.small import small_model, small_tokenizer

LONGBENCH = {
    "_id": "ab12", "input": "Who keeps {it}?", "context": "Ann keeps it. {context} " * 20, "answers": ["Ann", "her"],
    "dataset": "hotpotqa_e", "all_classes": None, "length": 80, "language": "en",
}  # fmt: skip
RULER = {"index": 3, "input": "A special magic number is 81. What is it? It is", "outputs": ["81", "92"], "length": 40}


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


def test_a_longbench_line_becomes_its_prompt(tmp_path):
    (asked,) = read_longbench(write(tmp_path / "x.jsonl", LONGBENCH))
    assert (asked.task, asked.name, asked.answers, asked.tokens, asked.chat) == (
        "hotpotqa",
        "ab12",
        ("Ann", "her"),
        32,
        True,
    )
    assert asked.prompt.endswith("do not output any other words.\n\nQuestion: Who keeps {it}?\nAnswer:")
    assert f"The following are given passages.\n{LONGBENCH['context']}\n\n" in asked.prompt


def test_a_ruler_line_is_its_prompt(tmp_path):
    (tmp_path / "qa_1").mkdir()
    (asked,) = read_ruler(write(tmp_path / "niah_single_1.jsonl", RULER))
    (other,) = read_ruler(write(tmp_path / "qa_1" / "validation.jsonl", RULER))
    assert (asked.task, other.task) == ("niah_single_1", "qa_1")
    assert asked.prompt == RULER["input"] and not asked.chat
    assert asked.score("it's 81, I think") == {"match": 0.5}  # everything has to be found
    assert other.score("it's 81, I think") == {"match": 1.0}  # one wording is enough
    assert asked.score("92 81") == {"match": 1.0}


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("The Cat.", "a cat", 1.0),
        ("a black cat", "cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("x x", "x", 2 / 3),
    ],
)
def test_f1_counts_words_in_common(answer, right, f1):
    assert qa_f1(answer, right) == pytest.approx(f1)


def test_the_best_of_the_right_answers_counts():
    asked = Asked("longbench", "qasper", "1", "", True, ("no", "black cat"), 8)
    assert asked.score("A black cat!") == {"f1": 1.0}


@pytest.mark.parametrize(
    ("read", "line", "message"),
    [
        (
            read_longbench,
            {**LONGBENCH, "dataset": "trec"},
            "line 2: field dataset must be one of narrativeqa, .*'trec'",
        ),
        (read_longbench, {k: v for k, v in LONGBENCH.items() if k != "context"}, "line 2: field context is missing"),
        (read_longbench, {**LONGBENCH, "answers": "Ann"}, "line 2: field answers must be of type list, got 'Ann'"),
        (read_longbench, {**LONGBENCH, "answers": []}, "line 2: field answers must be a list of strings, at least one"),
        (read_longbench, RULER, "line 2: field dataset is missing; there are index, input, outputs, length"),
        (read_ruler, {**RULER, "index": "3"}, "line 2: field index must be of type int, got '3'"),
        (read_ruler, {**RULER, "outputs": [81]}, "line 2: field outputs must be a list of strings"),
        (read_ruler, LONGBENCH, "line 2: field index is missing"),
        (read_ruler, [1], "line 2: a JSON object was expected, got list"),
    ],
)
def test_a_wrong_line_is_named(read, line, message, tmp_path):
    good = LONGBENCH if read is read_longbench else RULER
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "x.jsonl", good, line))


def test_files_that_hold_nothing_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "text.jsonl").write_text("index: 1\n", encoding="utf-8")
    for name, message in (("empty", "is empty"), ("text", "line 1: no JSON"), ("none", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_ruler(tmp_path / f"{name}.jsonl")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"index": NaN}', '{"index": 1, "index": 2}', '{"index": 1e999}'])
def test_odd_json_is_named_by_its_line(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(RULER) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: no JSON"):
        read_ruler(path)


def test_a_line_ends_only_where_json_says(tmp_path):
    row = {**RULER, "input": "one\u2028two\x85three"}
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(RULER) + "\n", encoding="utf-8", newline=""
    )
    assert [asked.prompt for asked in read_ruler(path)] == [row["input"], RULER["input"]]


def test_too_long_a_prompt_loses_its_middle():
    model, tokenizer = small_model(), small_tokenizer()
    long = Asked("ruler", "x", "0", "ab" * 1000, False, ("y",), 24)
    ids = prompt_ids(model, tokenizer, long)
    assert ids.shape == (1, 1000)  # of 1,024 positions
    assert tokenizer.decode(ids[0]) == "ab" * 500


def test_a_chat_template_goes_around_a_question_but_not_around_a_whole_prompt():
    model, tokenizer = small_model(), small_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    for chat, expected in ((True, "<Why?>A:"), (False, "Why?")):
        ids = prompt_ids(model, tokenizer, Asked("x", "x", "0", "Why?", chat, ("y",), 4))
        assert tokenizer.decode(ids[0]) == expected


def test_everyone_answers_every_question():
    model, tokenizer = small_model(), small_tokenizer()
    asked = [Asked("ruler", "vt", str(i), "It is 81. " * n, False, ("81",), 6) for i, n in enumerate((40, 45))]
    records = run(model, tokenizer, asked, contenders(["streaming", "h2o"], [1.0, 0.2]))
    assert [r["contender"] for r in records[:7]] == [FULL, *["oracle_topk", "streaming", "h2o"] * 2]
    assert [r["length"] for r in records] == [400] * 7 + [450] * 7
    for number in (0, 1):
        mine = [r for r in records if r["unit"] == number]
        answers = [r["answer"] for r in mine[:4]]
        assert answers == answers[:1] * 4 and answers[0] != ""  # a budget of everything
        for record in mine[5:]:
            assert record["values"]["keys_read"] == pytest.approx(0.2, abs=0.01)
        assert all(r["values"]["match"] == float("81" in r["answer"]) for r in mine)
