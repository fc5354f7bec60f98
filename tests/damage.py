"""Seeded damage to files: cut short, bytes flipped, values of JSON and of headers of other types and sizes."""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, "", "x", "1", "\u0000", [], [1], [[[]]], {},
    {"a": 1}, [10**9, 10**9], "../up", "é" * 300, ["x"] * 3,
)  # fmt: skip
RAW = ("NaN", "Infinity", "1e999", "[" * 100_000, '{"a":' * 5000, '"\\ud800"', "01", "9" * 5000)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes that a disk or a transfer might leave."""
    kind = chance.randrange(5)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        held = bytearray(data)
        for _ in range(chance.choice((1, 1, 3, 30))):
            held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
        return bytes(held)
    if kind == 2:
        return data + chance.randbytes(chance.choice((1, 8, 4000)))
    if kind == 3:
        first = chance.randrange(len(data))
        return data[:first] + bytes(len(data) - first)
    return chance.randbytes(len(data))


def changed(data: Any, chance: random.Random) -> Any:
    """The same JSON with one value, anywhere in it, taken out, doubled, renamed or replaced by an odd one."""
    places = [*_places(data)]
    holder, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(("x", "é", "99", str(key) + "0"))] = holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = chance.choice(ODD)
    return data


def spoil_json(path: Path, chance: random.Random) -> None:
    """Damage a file of JSON."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if chance.random() < 0.25:
        path.write_bytes(damaged(path.read_bytes(), chance))
    elif chance.random() < 0.15:
        text = path.read_text(encoding="utf-8")
        holder, key = chance.choice([*_places(data)])
        holder[key] = "@here@"
        text = json.dumps(data).replace('"@here@"', chance.choice(RAW))
        path.write_text(text, encoding="utf-8")
    else:
        path.write_text(json.dumps(changed(data, chance)), encoding="utf-8")


def spoil_tensors(path: Path, chance: random.Random) -> None:
    """Damage a safetensors file, by its bytes or by a value in its header."""
    data = path.read_bytes()
    if chance.random() < 0.4:
        path.write_bytes(damaged(data, chance))
        return
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(changed(json.loads(data[8 : 8 + length]), chance)).encode()
    claimed = chance.choice((len(header), len(header), len(header), 0, 1 << 40, len(data)))
    path.write_bytes(struct.pack("<Q", claimed) + header + data[8 + length :])


def refused(call: Callable[[], object], *, megabytes: int = 200, again: bool = False) -> bool:
    """Whether a call ends in ValueError, raised `again` if asked for; all else, and much memory, is a failure."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        call()
    except ValueError as error:
        assert str(error)
        if again:
            raise
        return True
    else:
        return False
    finally:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < megabytes, f"{grown:.0f} MB"


def _places(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value."""
    found: list[tuple[Any, Any]] = []
    inside = [data]
    while inside:
        part = inside.pop()
        keys = range(len(part)) if isinstance(part, list) else list(part) if isinstance(part, dict) else ()
        found += [(part, key) for key in keys]
        inside += [part[key] for key in keys]
    return found
