"""Gemma's tokenizer: the merges that SentencePiece would make, and texts that come back whole."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hashattn.lab.workload.gemma import BYTE, CONTROL, NORMAL, USER_DEFINED, tokenizer_from_gguf, tokenizer_from_pieces
from tests.structured import raises_naming

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>"]
OWN = ["\n", "\n\n", "  ", "<b>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
MERGED = ["ab", "▁a", "abc", "bc", "ca", "▁ab", "▁abc", "cab", "▁c", "▁ca", "aa", "aaa"]  # the best first
PIECES = [*CONTROLS, *OWN, *BYTES, *MERGED, "▁", "a", "b", "c"]
KINDS = [CONTROL] * 4 + [USER_DEFINED] * 4 + [BYTE] * 256 + [NORMAL] * (len(MERGED) + 4)
SCORES = [-1000.0] * 8 + [0.0] * 256 + [-float(i) for i in range(len(MERGED) + 4)]
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_from_pieces(PIECES, SCORES, KINDS, **SPECIAL)


def merged_by_hand(text: str) -> list[str]:
    """SentencePiece's rule: the best joint piece of two neighbours is merged, the leftmost of equal ones."""
    parts = list(text.replace(" ", "▁"))
    score = dict(zip(PIECES, SCORES, strict=True))
    while True:
        joint = [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not joint:
            return parts
        at = -max(joint)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_merges_are_those_of_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> None:
    chance = random.Random(1)
    texts = ["".join(chance.choices("abc ", weights=(4, 3, 3, 1), k=chance.randint(1, 30))) for _ in range(400)]
    compared = [text for text in texts if "  " not in text]  # two spaces are a piece of their own, matched before
    assert len(compared) > 200
    for text in compared:
        assert tokenizer.tokenize(text) == merged_by_hand(text), text


def test_texts_begin_with_bos_and_come_back(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("")["input_ids"] == [2]
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [PIECES.index("ab")]
    for text in (" abc  ca\n\n\nb", "<b>a", "é☃ \U0001f9a5", "\t", "  a "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 2 and 3 not in ids
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text
    assert tokenizer.tokenize("a\n\n\nb<b>é<eos>") == ["a", "\n\n", "\n", "b", "<b>", "<0xC3>", "<0xA9>", "<eos>"]


def test_a_saved_one_is_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " abc  ca\n\n\nb é<b>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (2, 1, 0)


def write_gguf(path: Path, kind: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(KINDS)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_it_is_read_from_a_gguf_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama")
    read = tokenizer_from_gguf(tmp_path / "model.gguf")
    assert read("abc  ca\nb")["input_ids"] == tokenizer("abc  ca\nb")["input_ids"]
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id, read.unk_token_id) == (2, 1, 0, 3)


def test_another_kind_of_tokenizer_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "gpt2")
    raises_naming(ValueError, "model.gguf", "'gpt2'", "'llama'")(lambda: tokenizer_from_gguf(tmp_path / "model.gguf"))
