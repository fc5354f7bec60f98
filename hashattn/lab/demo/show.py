"""How the demo shows its contenders: a table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from hashattn.lab import report
from hashattn.lab.demo.contest import OWN_CACHE, STOCK, Contender
from hashattn.lab.demo.run import Result

WIDTH = 30  # letters of an answer's line; a longer word is not cut, so that a fact stays whole
NOTE = f"""They took turns, a token each. times: as many tokens per second, by medians, as "{OWN_CACHE}", which is full
attention over a cache that appends in place, the honest baseline; and as "{STOCK}", the model on its own cache."""


def table(result: Result) -> str:
    """The contenders side by side."""
    contenders = result.contenders
    told: list[tuple[str, Callable[[Contender], str]]] = [
        ("contains the fact", _correct),
        ("ms a token, median", lambda c: f"{c.ms:.1f}"),
        ("ms a token, p99", lambda c: f"{c.p99_ms:.1f}"),
        (f"times {OWN_CACHE}", lambda c: f"{c.times_own_cache:.2f}"),
        (f"times {STOCK}", lambda c: f"{c.times_stock:.2f}"),
        ("tokens per second", lambda c: f"{c.tokens_per_second:.1f}"),
        ("keys read per token", lambda c: f"{c.keys_read:.1%}"),
        ("bytes read per token", lambda c: _megabytes(c.bytes_per_step)),
        ("memory, keys and values", lambda c: _megabytes(c.kv_bytes)),
        ("memory, codes", lambda c: _megabytes(c.code_bytes) if c.code_bytes else "none"),
        ("building the index, once", lambda c: f"{c.indexing_seconds:.2f} s" if c.code_bytes else "none"),
    ]
    rows = [["", *(c.name for c in contenders)], *_answers(contenders)]
    return report.aligned([*rows, *([title, *map(cell, contenders)] for title, cell in told)], left=True)


def _answers(contenders: tuple[Contender, ...]) -> list[list[str]]:
    """The whole answers, on as many lines as the longest takes."""
    wrapped = [
        textwrap.wrap(c.answer, WIDTH, break_long_words=False, break_on_hyphens=False) or ["(nothing)"]
        for c in contenders
    ]
    lines = max(map(len, wrapped))
    filled = [[*answer, *[""] * (lines - len(answer))] for answer in wrapped]
    return [["answer" if i == 0 else "", *line] for i, line in enumerate(zip(*filled, strict=True))]


def _correct(contender: Contender) -> str:
    return {True: "yes", False: "no", None: "not known"}[contender.correct]


def _megabytes(n: float) -> str:
    return f"{n / 1e6:.1f} MB"
