"""Which of an operation's implementations is asked for."""

from __future__ import annotations

ENGINES = ("reference", "cpu")


def on_cpu(engine: str) -> bool:
    """Whether the CPU's implementation is asked for, rather than the reference.

    Raises:
        ValueError: another word.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be {' or '.join(map(repr, ENGINES))} for an operation, got {engine!r}")
    return engine == "cpu"
