"""What a selector is, and how `|` joins forced keys with a ranked selector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from hashattn.ops.decode.rule import Rule
from hashattn.types import Selection, Step
from hashattn.view import View, forced_ids
from hashattn.votes import Shown, Votes

if TYPE_CHECKING:
    from hashattn.attend import Attend
    from hashattn.encoders import Encoder
    from hashattn.index import Index


class Selector(ABC):
    """Chooses keys for each query.

    Attributes:
        ranked: whether it ranks keys by distance, and so needs an encoder and an index.
        matrices: passes over a matrix of all distances that it makes beyond a search, about.
        needs_weights: whether it looks at the softmax weights of the layer before (momentum).
        samples: whether some of its keys stand for others.
        observes: whether it learns from the calls before.
        one_by_one: whether it learns from each query that searches, before the next one.
        needs_distances: whether it asks for the distance to every key, which an index that only searches lacks.
    """

    ranked: bool = True
    needs_distances: bool = True
    matrices: int = 0
    needs_weights: bool = False
    samples: bool = False
    observes: bool = False
    one_by_one: bool = False

    @property
    def shared(self) -> bool:
        """Whether the query heads of a KV head share one choice."""
        return False

    @property
    def follows(self) -> bool:
        """Whether it looks at what the layer before kept."""
        inner = getattr(self, "inner", None)
        return self.needs_weights or (isinstance(inner, Selector) and inner.follows)

    @abstractmethod
    def select(self, view: View, step: Step) -> Selection:
        """The keys kept by each query of the view."""

    @abstractmethod
    def budget(self, visible: int) -> int:
        """Keys kept, at most, by a query that sees `visible` keys: for query plans."""

    def critical(self, visible: int) -> int:
        """How many of these get exact logits, at most."""
        return self.budget(visible)

    def looked_at(self, visible: int) -> int:
        """Keys that it reads itself, at most, beside the index: for query plans."""
        inner = getattr(self, "inner", None)
        return inner.looked_at(visible) if isinstance(inner, Selector) else 0

    def observe(  # noqa: B027 (most look at nothing)
        self, shown: Shown, selection: Selection | None = None, weights: Tensor | None = None
    ) -> None:
        """Take note of a call; of each position once.

        Args:
            shown: its queries and the keys, all of which they attended to.
            selection: unless they kept these; only of a single query, and if it is asked one by one.
            weights: then its softmax weights over them, [B, Hq, 1, K].
        """

    def settle(  # noqa: B027
        self, votes: Votes, keys: Tensor, starts: Sequence[int], layer: int
    ) -> None:
        """Bring votes up to date before a search; keys [B, Hkv, N, D] and the rows' first columns are the cache's."""

    def refuses(self, encoder: Encoder, index: Index, attend: Attend) -> str | None:
        """Why it cannot work with these parts, and what would fit, as the end of a sentence; None if it can."""
        inner = getattr(self, "inner", None)
        return inner.refuses(encoder, index, attend) if isinstance(inner, Selector) else None

    def rule(self, group: int) -> Rule | None:
        """What it asks of a fused decode step, for `group` query heads a KV head; None if a Rule cannot say it."""
        return None

    def __or__(self, other: Selector) -> Joined:
        if not isinstance(other, Selector):
            return NotImplemented
        parts = [p for s in (self, other) for p in (s.parts if isinstance(s, Joined) else (s,))]
        return Joined(tuple(parts))


@dataclass(frozen=True)
class Forced(Selector):
    """Keeps keys by position: the first `sinks` and the last `recents` visible ones. Made by Sink and Recent."""

    @property
    def sinks(self) -> int:
        return 0

    @property
    def recents(self) -> int:
        return 0

    ranked = False
    needs_distances = False

    @property
    def shared(self) -> bool:
        return True

    def budget(self, visible: int) -> int:
        return min(visible, self.sinks + self.recents)

    def select(self, view: View, step: Step) -> Selection:
        return Selection(forced_ids(view, self.sinks, self.recents))


def forced_slots(view: View, ids: Tensor) -> Tensor:
    """bool as ids [B, H, T, K]: which slots hold one of the view's forced keys."""
    first, end = (x[:, None, :, None] for x in view.visible.unbind(-1))  # [B, 1, T, 1]
    return (ids >= 0) & ((ids < first + view.sinks) | (ids >= end - view.recents))


@dataclass(frozen=True)
class Joined(Selector):
    """Forced parts and at most one ranked selector, written `Sink(4) | Recent(64) | TopK(share=0.05)`.

    Forced keys are ranked before every distance and count in the ranked selector's budget; where the budget is
    smaller than their number, they alone are kept.
    """

    parts: tuple[Selector, ...]

    def __post_init__(self) -> None:
        ranked = [p for p in self.parts if not isinstance(p, Forced)]
        if len(ranked) > 1:
            raise ValueError(
                f"`|` joins forced parts (Sink, Recent) with one ranked selector, got {len(ranked)}: {ranked}"
            )

    @property
    def ranked_part(self) -> Selector | None:
        return next((p for p in self.parts if not isinstance(p, Forced)), None)

    @property
    def ranked(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.ranked

    @property
    def samples(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.samples

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.observes

    @property
    def one_by_one(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.one_by_one

    @property
    def follows(self) -> bool:
        return self.ranked_part is not None and self.ranked_part.follows

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return 0 if self.ranked_part is None else self.ranked_part.matrices

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.needs_weights

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.needs_distances

    @property
    def shared(self) -> bool:
        return self.ranked_part is None or self.ranked_part.shared

    @property
    def sinks(self) -> int:
        return max((p.sinks for p in self.parts if isinstance(p, Forced)), default=0)

    @property
    def recents(self) -> int:
        return max((p.recents for p in self.parts if isinstance(p, Forced)), default=0)

    def budget(self, visible: int) -> int:
        forced = min(visible, self.sinks + self.recents)
        return forced if self.ranked_part is None else max(forced, self.ranked_part.budget(visible))

    def critical(self, visible: int) -> int:
        forced = min(visible, self.sinks + self.recents)
        return forced if self.ranked_part is None else max(forced, self.ranked_part.critical(visible))

    def looked_at(self, visible: int) -> int:
        return self.ranked_part.looked_at(visible) if self.ranked_part is not None else 0

    def observe(self, shown: Shown, selection: Selection | None = None, weights: Tensor | None = None) -> None:
        if self.ranked_part is not None:
            self.ranked_part.observe(shown, selection, weights)

    def settle(self, votes: Votes, keys: Tensor, starts: Sequence[int], layer: int) -> None:
        if self.ranked_part is not None:
            self.ranked_part.settle(votes, keys, starts, layer)

    def refuses(self, encoder: Encoder, index: Index, attend: Attend) -> str | None:
        return self.ranked_part.refuses(encoder, index, attend) if self.ranked_part is not None else None

    def rule(self, group: int) -> Rule | None:
        ranked = self.ranked_part.rule(group) if self.ranked_part is not None else None
        return replace(ranked, sinks=self.sinks, recents=self.recents) if ranked is not None else None

    def select(self, view: View, step: Step) -> Selection:
        if self.ranked_part is None:
            return Selection(forced_ids(view, self.sinks, self.recents))
        sinks, recents = max(self.sinks, view.sinks), max(self.recents, view.recents)  # an outer Joined's stay forced
        sinks, recents = min(sinks, view.keys), min(recents, view.keys)
        return self.ranked_part.select(replace(view, sinks=sinks, recents=recents), step)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))
