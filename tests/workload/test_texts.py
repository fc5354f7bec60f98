"""Texts: shares of them, and sequences that do not overlap."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from hashattn.workload.prompt import beginning
from hashattn.workload.texts import Text, read_text, windows
from tests.demo.test_story import Letters
from tests.structured import raises_naming

ALPHABET = Text("alphabet", "".join(chr(65 + i) for i in range(60)))


def test_a_file_is_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes(b"caf\xc3\xa9 \xff!")
    text = read_text(path)
    assert (text.name, text.content) == ("plain.txt", "café �!")
    assert text.sha256 == hashlib.sha256("café �!".encode()).hexdigest()
    assert read_text(None).content.startswith("ALL'S WELL THAT ENDS WELL")


def test_files_that_hold_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    raises_naming(ValueError, "blank.txt", "empty")(lambda: read_text(tmp_path / "blank.txt"))
    raises_naming(ValueError, "missing.txt", "cannot be read")(lambda: read_text(tmp_path / "missing.txt"))
    raises_naming(ValueError, str(tmp_path), "cannot be read")(lambda: read_text(tmp_path))


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


def test_a_tokenizer_that_begins_nothing_has_no_prefix() -> None:
    class Plain(Letters):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return super().__call__(text, add_special_tokens=False)

    assert beginning(Letters()) == [0]  # type: ignore[arg-type]
    assert beginning(Plain()) == []  # type: ignore[arg-type]
    assert windows(Plain(), ALPHABET, 60, 1, seed=0)[0].tolist() == [[*range(65, 125)]]  # type: ignore[arg-type]
