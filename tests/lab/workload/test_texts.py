"""Texts: shares of them, and sequences that do not overlap."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from hashattn.lab.workload import texts
from hashattn.lab.workload.prompt import beginning
from hashattn.lab.workload.texts import Text, read_text, windows
from tests.lab.demo.test_story import Letters
from tests.structured import raises_naming

ALPHABET = Text("alphabet", "".join(chr(65 + i) for i in range(60)))


def test_a_file_is_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n!")
    text = read_text(path)
    assert (text.name, text.content) == ("plain.txt", "café\n!")
    assert text.sha256 == hashlib.sha256("café\n!".encode()).hexdigest()
    assert read_text(None).content.startswith("ALL'S WELL THAT ENDS WELL")


def test_files_that_hold_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    raises_naming(ValueError, "blank.txt", "empty")(lambda: read_text(tmp_path / "blank.txt"))
    raises_naming(ValueError, "missing.txt", "cannot be read")(lambda: read_text(tmp_path / "missing.txt"))
    raises_naming(ValueError, str(tmp_path), "cannot be read")(lambda: read_text(tmp_path))
    for name, held, words in (
        ("latin.txt", b"caf\xe9 au lait", ["no text in UTF-8", "byte 3 is 0xe9", "iconv"]),
        ("picture.png", b"\x89PNG\x0d\x0a\x1a\x0a\x00\x00", ["zero bytes"]),
        ("wide.txt", "wide".encode("utf-16"), ["zero bytes", "UTF-16"]),
    ):
        (tmp_path / name).write_bytes(held)
        raises_naming(ValueError, name, *words)(lambda n=name: read_text(tmp_path / n))


def test_shares_split_a_text_without_loss() -> None:
    parts = [ALPHABET.share(a, b).content for a, b in ((0, 0.37), (0.37, 0.9), (0.9, 1))]
    assert "".join(parts) == ALPHABET.content
    for first, last in ((0.5, 0.5), (0.6, 0.5), (-0.1, 1), (0, 1.1), (float("nan"), 1)):
        raises_naming(ValueError, str(first), str(last))(lambda a=first, b=last: ALPHABET.share(a, b))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 3, 6])
def test_windows_do_not_overlap_and_begin_as_texts_do(count: int, seed: int) -> None:
    found = windows(Letters(), ALPHABET, 10, count, seed=seed)
    assert len(found) == count
    taken = torch.cat([ids[0, 1:] for ids in found])
    assert all(ids.shape == (1, 10) and ids.dtype == torch.int64 and ids[0, 0] == 0 for ids in found)
    assert torch.equal(taken, taken.unique())  # ascending letters: in order, none twice
    assert all((ids[0, 2:] - ids[0, 1:-1] == 1).all() for ids in found)
    assert torch.equal(torch.cat(found), torch.cat(windows(Letters(), ALPHABET, 10, count, seed=seed)))


def test_places_vary_with_the_seed_up_to_both_ends() -> None:
    starts = {int(windows(Letters(), ALPHABET, 50, 1, seed=seed)[0][0, 1]) - 65 for seed in range(200)}
    assert starts == set(range(12))


def test_a_short_text_says_what_it_has_and_what_is_needed() -> None:
    raises_naming(ValueError, "'alphabet'", "has 60 tokens", "7 sequences of 10 need 63")(
        lambda: windows(Letters(), ALPHABET, 10, 7, seed=0)
    )


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_long_texts_are_read_by_pieces_that_end_with_a_line(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    class Listens(Letters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            given.append(text)
            return super().__call__(text, **options)

    monkeypatch.setattr(texts, "PIECE", piece)
    content = "one\ntwo\n\nthree four\nfive"
    ids = texts.tokens_of(Listens(), content)  # type: ignore[arg-type]
    assert "".join(map(chr, ids.tolist())) == "".join(given) == content
    assert all(len(part) <= piece for part in given)
    assert piece != 7 or given == ["one\n", "two\n\n", "three f", "our\n", "five"]


def test_a_tokenizer_that_begins_nothing_has_no_prefix() -> None:
    class Plain(Letters):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return super().__call__(text, add_special_tokens=False)

    assert beginning(Letters()) == [0]  # type: ignore[arg-type]
    assert beginning(Plain()) == []  # type: ignore[arg-type]
    assert windows(Plain(), ALPHABET, 60, 1, seed=0)[0].tolist() == [[*range(65, 125)]]  # type: ignore[arg-type]
