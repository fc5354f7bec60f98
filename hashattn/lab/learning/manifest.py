"""Manifest: capture.json, which says what a folder of captured shards holds and how it came about."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashattn.core.json_files import read_json, whole_number, write_json
from hashattn.core.model_facts import ModelFacts
from hashattn.core.version import __version__

FORMAT_VERSION = 1
FILENAME = "capture.json"
LOCK = ".capture.lock"  # held while somebody captures into the folder
LARGEST = 64 << 20  # bytes of capture.json
LONGEST = 1 << 31  # tokens of a sequence
DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Recording:
    """One captured sequence.

    Attributes:
        name: of its folder.
        kind: "text", or the retrieval task: "needle", "multikey", "copy".
        source: the text that it was taken from.
        tokens: how many were prefilled.
        asked: the column where a retrieval prompt's question begins; all tokens are before it in a text.
        decoded: how many the model itself wrote after them.
        seed: what its prompt, its continuation and its queries were drawn with.
    """

    name: str
    kind: str
    source: str
    tokens: int
    asked: int
    decoded: int
    seed: int

    @property
    def keys(self) -> int:
        """Prefilled and decoded ones."""
        return self.tokens + self.decoded

    def check(self) -> None:
        """Raise ValueError for what cannot have been written by a capture."""
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]{1,100}", self.name):
            raise ValueError(f"a sequence's name must be letters, digits and dashes, got {self.name!r:.200}")
        for name in ("kind", "source"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{self.name}: {name} must be a string, got {getattr(self, name)!r:.100}")
        numbers = {"tokens": self.tokens, "asked": self.asked, "decoded": self.decoded}
        least = {"tokens": 1, "asked": 0, "decoded": 0}
        if not all(whole_number(n, least[name], LONGEST) for name, n in numbers.items()) or self.asked > self.tokens:
            raise ValueError(
                f"{self.name}: tokens, decoded and asked must be numbers up to {LONGEST}, asked <= tokens, "
                f"got {numbers!r:.300}"
            )
        if type(self.seed) is not int:
            raise ValueError(f"{self.name}: seed must be a number, got {self.seed!r:.100}")


@dataclass(frozen=True)
class Manifest:
    """What is captured: the model's facts, its layers, the dtype of the files, the sequences, what was asked for."""

    facts: ModelFacts
    layers: tuple[int, ...]
    dtype: str
    sequences: tuple[Recording, ...]
    arguments: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return {
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "model": self.facts.as_json(),
            "layers": list(self.layers),
            "dtype": self.dtype,
            "arguments": self.arguments,
            "sequences": [dataclasses.asdict(s) for s in self.sequences],
        }

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """What as_json() wrote.

        Raises:
            ValueError: another format, or a field that is missing or of another type.
        """
        if not isinstance(data, Mapping) or "format_version" not in data:
            raise ValueError("it is no description of a capture")
        version = data["format_version"]
        if version != FORMAT_VERSION or type(version) is not int:
            raise ValueError(f"its format_version is {version!r:.100}, this version reads {FORMAT_VERSION}")
        try:
            facts = ModelFacts.from_json(data["model"])
            layers, dtype, arguments = tuple(data["layers"]), data["dtype"], dict(data["arguments"])
            sequences = tuple(Recording(**s) for s in data["sequences"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a field is missing or of another type: {error}") from error
        numbers = [i for i in layers if whole_number(i, 0, facts.layers)]
        if not layers or len(set(numbers)) != len(layers) or not set(numbers) <= set(facts.attention_layers):
            raise ValueError(f"layers must be among {list(facts.attention_layers)}, got {list(layers)!r:.200}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r:.100}")
        for s in sequences:
            s.check()
        if not sequences or len({s.name for s in sequences}) != len(sequences):
            raise ValueError("sequences must be there, each by a name of its own")
        return cls(facts, layers, dtype, sequences, arguments)

    def differences(self, other: Manifest) -> list[str]:
        """What sets two captures apart: "tokens is 2048 here and 4096 there". Versions of the library may differ."""
        here, there = _asked(self), _asked(other)
        found = [
            f"{name} is {here.get(name)!r} here and {there.get(name)!r} there"
            for name in dict.fromkeys((*here, *there))
            if here.get(name) != there.get(name)
        ]
        if not found and self.sequences != other.sequences:
            found = ["this version of the library makes other sequences from the same arguments"]
        return found


def read(folder: str | Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(folder) / FILENAME
    try:
        return Manifest.from_json(read_json(path, LARGEST))
    except OSError as error:
        raise ValueError(f"{str(folder)!r} holds no capture ({error}): make one with hashattn capture") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be used: {error}") from error


def claim(manifest: Manifest, folder: str | Path) -> None:
    """Make the folder one for this capture, or find that it is one already.

    Raises:
        ValueError: it holds something else, or a capture with other arguments.
    """
    folder = Path(folder)
    check_free(folder)
    if (folder / FILENAME).exists():
        if different := manifest.differences(read(folder)):
            raise ValueError(
                f"out={str(folder)!r} (there) holds a capture with other arguments: {'; '.join(different)}; give the "
                "same ones to resume it, or another folder"
            )
        return
    Manifest.from_json(manifest.as_json())  # what could not be read again is refused now
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILENAME, manifest.as_json())


def check_free(folder: str | Path) -> None:
    """Raise ValueError if a folder holds something that is no capture; hidden files are what a kill left."""
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a broken link"
        raise ValueError(f"out={str(folder)!r} is {kind}: name a new or an empty folder")
    found = [] if not folder.is_dir() else sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if found and FILENAME not in found:
        raise ValueError(f"out={str(folder)!r} holds other files ({found[0]}, ...): name a new or an empty folder")


def _asked(manifest: Manifest) -> dict[str, Any]:
    """All that two runs must agree on, by the name to tell the user."""
    facts = {f"model's {name}": value for name, value in manifest.facts.as_json().items()}
    return {**facts, "layers": list(manifest.layers), "dtype": manifest.dtype, **manifest.arguments}
