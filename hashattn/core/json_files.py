"""Reading JSON that others may have written or damaged: what is odd is refused at once, and cheaply."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hashattn.core.files import replacing

LARGEST = 16 << 20  # bytes of a file
DEEPEST = 32  # lists and objects inside one another


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """What a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, it is larger than `largest` bytes, or parse_json() refuses it; the file is named.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no file")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    try:
        if len(data) > largest:
            raise ValueError(f"it is larger than {largest:,} bytes")
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def parse_json(data: bytes | str) -> Any:
    """Plain data out of JSON.

    Raises:
        ValueError: no UTF-8 or no JSON, a field twice, NaN, an infinite number, or more than 32 levels.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        found = json.loads(text, parse_constant=_constant, parse_float=_finite, object_pairs_hook=_once)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    level, depth = [found], 0
    while level := [x for part in level if isinstance(part, list | dict) for x in _inside(part)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    return found


def write_json(path: Path, data: Any) -> None:
    """There whole, or not at all. ValueError for numbers that are not finite."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_number(value: Any, least: int, most: int) -> bool:
    """Whether it is an int, and no bool, of this range."""
    return type(value) is int and least <= value <= most


def _inside(part: list[Any] | dict[str, Any]) -> list[Any]:
    return part if isinstance(part, list) else [*part.values()]


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is more than a float holds")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is there twice")
    return found
