"""Options: how a model is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hashattn.selectors.base import nearest_word

AUTO, NEVER, ALWAYS = GRAPHS = "auto", "never", "always"
GRAPH = AUTO  # by default
DENSE = "dense"
DRAFT, MOST_DRAFTED = 5, 15  # tokens, by default and at most


@dataclass(frozen=True)
class Options:
    """How a model is served, as attach() was told.

    Attributes:
        strict: refuse models, caches and masks that cannot be served. Without it they run densely, as report() says.
        max_sparse_q: queries of a call up to which it searches; raise it for speculative decoding.
        trace: count which positions are read; see Handle.reads().
        simulate: every call, however long, searches at every position: each query chooses among the keys up to its own
            as if it were decoded, with or without a cache. For likelihoods (one long forward); it saves no time.
            "auto" then searches at every length; `max_sparse_q` and `trace` concern calls of one token only.
        graph: "auto", the default: after the prefill, calls of at most `max_sparse_q` tokens of a model on CUDA replay
            one CUDA graph of its layers, which is captured by itself, with no argument to generate(): the same tokens,
            without the time that Python takes. The first such call of a cache runs before that is captured: a text's
            first token waits for nothing. What cannot be captured runs as ever, and report().graph says why.
            "always": such a call raises ValueError, which names the reason; the first one is captured and replayed as
            well. "never": every call runs as ever.
        check: "dense": model.generate() writes what it writes unattached, greedy or sampled. A few tokens are drafted
            by search, then one pass over them with full attention takes those that it would have written and corrects
            the next; report().drafts says how often. Beams and other ways to generate are refused. None: what is
            searched is written.
        draft: tokens of a draft at most, 1 to 15; 5 by default. Fewer are drafted where that is faster, none where
            drafts do not pay. Only with `check`.
    """

    strict: bool = True
    max_sparse_q: int = 1
    trace: bool = False
    simulate: bool = False
    graph: str = GRAPH
    check: str | None = None
    draft: int | None = None

    def __post_init__(self) -> None:
        if self.max_sparse_q < 1:
            raise ValueError(f"max_sparse_q must be at least 1, got {self.max_sparse_q}")
        if self.graph not in GRAPHS:
            raise ValueError(f"graph must be one of {', '.join(map(repr, GRAPHS))}, got {self.graph!r}")
        self._check_drafts()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Those that were given, by name.

        Raises:
            TypeError: a name of none; the nearest one is named.
            ValueError: a value that is refused.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"{name!r} is no option{nearest_word(name, known)}: there are {', '.join(known)}")
        return cls(**given)

    @property
    def drafted(self) -> int:
        """Tokens of a draft at most; 0 where nothing is drafted."""
        if self.check is None:
            return 0
        return DRAFT if self.draft is None else self.draft

    def _check_drafts(self) -> None:
        if self.check not in (None, DENSE):
            raise ValueError(f"check must be {DENSE!r} or None, got {self.check!r}")
        if self.check is None:
            if self.draft is not None:
                raise ValueError(f'draft={self.draft!r} is for drafts that are checked: add check="{DENSE}"')
            return
        if type(self.drafted) is not int or not 1 <= self.drafted <= MOST_DRAFTED:
            raise ValueError(f"draft must be 1 to {MOST_DRAFTED} tokens, got {self.draft!r}")
        if self.max_sparse_q != 1:
            raise ValueError(
                f'with check="{DENSE}" calls of several tokens are checks, which are dense: leave max_sparse_q at 1, '
                f"got {self.max_sparse_q}"
            )
        if self.simulate:
            raise ValueError(f'simulate=True searches in every call, so that check="{DENSE}" could check nothing')

    def refuse(self, reason: str | None) -> None:
        """Raise ValueError for a call that cannot be served for this reason, if that is wanted; None is none."""
        if reason is not None and self.strict:
            raise ValueError(f"this call cannot be served: {reason} (attach with strict=False to run it densely)")
