"""What drafts of an attached model came to: counts of passes, accepted tokens and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hashattn.core.guard import Guard


@dataclass(frozen=True)
class DraftUse:
    """What came of drafts by search that full attention checked.

    Attributes:
        passes: checks of drafts.
        plain: steps without a draft, because none was expected to pay, or none was left to write.
        tokens: that both wrote, of all rows.
        rows: of all these, so that tokens / rows is what a call of full attention wrote a row.
        acceptance: by position in the draft, the share of tokens that were accepted, of those that were looked at.
        fidelity: the share of drafted tokens, of those that were looked at, that full attention chose as well: how
            often search alone would have gone on as full attention does. None where none was looked at.
        drafting, checking: seconds; checking includes plain steps.
    """

    passes: int
    plain: int
    tokens: int
    rows: int
    acceptance: tuple[float, ...]
    fidelity: float | None
    drafting: float
    checking: float

    @property
    def tokens_a_pass(self) -> float:
        """Tokens that a call of full attention wrote a row, mean."""
        return self.tokens / max(1, self.rows)

    def __str__(self) -> str:
        head = (
            f"drafts: {self.tokens} tokens in {self.passes} checks and {self.plain} plain steps, "
            f"{self.tokens_a_pass:.2f} a pass and row; {self.drafting:.2f} s drafting, {self.checking:.2f} s checking"
        )
        if self.fidelity is None:
            return head
        shares = ", ".join(f"{share:.2f}" for share in self.acceptance)
        return (
            f"{head}\naccepted by position: {shares}; search alone would have chosen another token than full "
            f"attention at {1 - self.fidelity:.1%} of positions"
        )


@dataclass
class DraftCounts:
    """The same while it is counted; threads share it."""

    passes: int = 0
    plain: int = 0
    tokens: int = 0
    rows: int = 0
    looked_at: Counter[int] = field(default_factory=Counter)  # by position
    accepted: Counter[int] = field(default_factory=Counter)
    drafting: float = 0.0
    checking: float = 0.0
    guard: Guard = field(default_factory=Guard)

    def saw(self, length: int, tokens: Sequence[int], drafting: float, checking: float) -> None:
        """Count a pass with a draft of so many tokens, 0 for none, that wrote so many tokens to each row."""
        with self.guard:
            self.passes += length > 0
            self.plain += length == 0
            self.tokens += sum(tokens)
            self.rows += len(tokens)
            self.drafting += drafting
            self.checking += checking

    def look(self, position: int, rows: int, accepted: int) -> None:
        """Count the drafted tokens of so many rows at a position of the draft, and how many were accepted."""
        with self.guard:
            self.looked_at[position] += rows
            self.accepted[position] += accepted

    def use(self) -> DraftUse:
        """What was counted."""
        with self.guard:
            looked_at, accepted = sum(self.looked_at.values()), sum(self.accepted.values())
            shares = [self.accepted[i] / n for i, n in sorted(self.looked_at.items()) if n]
            fidelity = accepted / looked_at if looked_at else None
            done = self.passes, self.plain, self.tokens, self.rows
            return DraftUse(*done, tuple(shares), fidelity, self.drafting, self.checking)
