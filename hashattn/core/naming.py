"""How a message names a part: as Python writes it, cut where that would bury the cause."""

from __future__ import annotations

LONGEST = 60


def short(part: object) -> str:
    """repr(part), or what of it stands on the first line within LONGEST characters."""
    text = repr(part)
    first = text.partition("\n")[0][:LONGEST]
    return text if first == text else f"{first}..."
