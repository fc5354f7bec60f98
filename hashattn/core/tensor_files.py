"""Safetensors files: written whole, and read only after their header has been judged."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hashattn.core.extras import require
from hashattn.core.files import replacing
from hashattn.core.json_files import parse_json, whole_number

SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
LONGEST = 4 << 20  # bytes of a header
LARGEST = 8 << 30  # bytes of a file
_LENGTH = 8  # bytes that say how long the header is


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as the header has it: its dtype in the words of safetensors, its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {[*self.shape]}"


def header(path: Path) -> dict[str, Stored]:
    """What a file says that it holds, once it is sure that it has the bytes for that; no tensor is read.

    Raises:
        ValueError: no such file, cut short, or damaged; the file is named.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing" if not path.exists() else f"{str(path)!r} is no file")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(_LENGTH).ljust(_LENGTH, b"\0"))
            if size > LARGEST:
                raise ValueError(f"it has {size:,} bytes, more than {LARGEST:,}")
            if not 2 <= length <= size - _LENGTH:
                raise ValueError(f"its header should have {length:,} bytes, the file has {size:,}")
            if length > LONGEST:
                raise ValueError(f"its header has {length:,} bytes, more than {LONGEST:,}")
            return _entries(parse_json(file.read(length)), size - _LENGTH - length)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is cut short or damaged: {error}") from error


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own.

    Raises:
        ValueError: no such file, cut short or damaged; the file is named.
    """
    safetensors = require("safetensors.torch", "hf", "reading weights")
    failed = require("safetensors", "hf", "reading weights").SafetensorError
    header(path)
    try:
        loaded: dict[str, Tensor] = safetensors.load(path.read_bytes())
    except (OSError, ValueError, KeyError, failed) as error:
        raise ValueError(f"{str(path)!r} is cut short or damaged: {error}") from error
    return loaded


def write(path: Path, tensors: Mapping[str, Tensor], **notes: object) -> None:
    """Write tensors, with notes in the header: there whole, or not at all."""
    with replacing(path) as scratch:
        scratch.write_bytes(packed(tensors, **notes))


def packed(tensors: Mapping[str, Tensor], **notes: object) -> bytes:
    """The content of a file of these tensors."""
    safetensors = require("safetensors.torch", "hf", "writing weights")
    held = {name: t.contiguous() for name, t in tensors.items()}
    # One note at most: safetensors writes several in an order that differs from run to run.
    data: bytes = safetensors.save(held, metadata={name: json.dumps(note) for name, note in notes.items()} or None)
    return data


def _entries(found: Any, room: int) -> dict[str, Stored]:
    """The tensors of a header; what they need must be all the room that there is."""
    if not isinstance(found, dict):
        raise ValueError(f"its header is no object, but {type(found).__name__}")
    tensors: dict[str, Stored] = {}
    parts: list[tuple[int, int]] = []
    for name, entry in found.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} must have dtype, shape and data_offsets, got {entry!r:.100}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in SIZES:
            raise ValueError(f"{name!r} has dtype {dtype!r:.100}; {', '.join(SIZES)} are known")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(whole_number(n, 0, LARGEST) for n in numbers):
                raise ValueError(f"{name!r} has {what} {numbers!r:.100}")
        if len(offsets) != 2 or offsets[1] - offsets[0] != SIZES[dtype] * math.prod(shape):
            raise ValueError(f"{name!r} of {dtype} {shape!r:.100} has data_offsets {offsets!r:.100}")
        tensors[name] = Stored(dtype, tuple(shape))
        parts.append((offsets[0], offsets[1]))
    end = 0
    for first, last in sorted(parts):
        if first != end:
            raise ValueError(f"a tensor begins at byte {first:,}, where {end:,} was expected")
        end = last
    if end != room:
        raise ValueError(f"its tensors need {end:,} bytes, the file has {room:,}")
    return tensors
