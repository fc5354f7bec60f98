"""What a selector is, and how `|` joins forced keys with a ranked selector."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from torch import Tensor, nn

from hashattn.core.attention_sums import Attended, AttentionSums
from hashattn.core.budget import check_one
from hashattn.core.kinds import HoldsCodes, MakesCodes, Weighs
from hashattn.core.types import Selection, Step
from hashattn.index.view import View, forced_ids
from hashattn.ops.decode.rule import Rule

BUDGET = ("k", "share")  # settings that every selector understands, if only to say what it takes instead


class Selector(ABC):
    """Chooses keys for each query.

    Attributes:
        ranked: whether it ranks keys by distance, and so needs an encoder and an index.
        matrices: passes over a matrix of all distances that it makes beyond a search, about.
        needs_weights: whether it looks at the softmax weights of the layer before (momentum).
        samples: whether some of its keys stand for others.
        accumulates: whether it learns from the calls before.
        one_by_one: whether it learns from each query that searches, before the next one.
        needs_distances: whether it asks for the distance to every key, which an index that only searches lacks.
    """

    ranked: bool = True
    needs_distances: bool = True
    matrices: int = 0
    needs_weights: bool = False
    samples: bool = False
    accumulates: bool = False
    one_by_one: bool = False

    @property
    def shared(self) -> bool:
        """Whether the query heads of a KV head share one choice."""
        return False

    @property
    def follows(self) -> bool:
        """Whether it looks at what the layer before kept."""
        return self.needs_weights

    @property
    def sinks(self) -> int:
        """This many first visible keys are kept for their position."""
        return 0

    @property
    def recents(self) -> int:
        """This many last visible keys are kept for theirs."""
        return 0

    @abstractmethod
    def select(self, view: View, step: Step) -> Selection:
        """The keys kept by each query of the view."""

    @abstractmethod
    def budget(self, visible: int, forced: int = 0) -> int:
        """Keys kept, at most, by a query that sees `visible` keys, `forced` of which are kept for their position."""

    def critical(self, visible: int, forced: int = 0) -> int:
        """How many of these get exact logits, at most."""
        return self.budget(visible, forced)

    def keys_read(self, visible: int, forced: int = 0) -> int:
        """Keys that it reads itself, at most, beside the index: for query plans."""
        return 0

    def choices(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        """(choices made, keys of each as a multiple of the budget, at most): the heads of a KV head may share one."""
        return (kv_heads if self.shared or not self.ranked else q_heads), 1

    def chooses_at(self, visible: int) -> bool:
        """Whether a query that sees so many keys may keep any beyond those that are kept for their position."""
        forced = min(visible, self.sinks + self.recents)
        return self.budget(visible, forced) > forced

    def settings(self) -> dict[str, Any]:
        """What revised() changes, by name: fields of a dataclass, also of the selectors inside it."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def name(self) -> str:
        """Its kind, for tables in which its repr has no room."""
        return type(self).__name__

    def with_budget(self, *, k: int | None = None, share: float | None = None) -> Selector:
        """The same with another budget, forced keys and samples included: k keys, or a share of the visible ones.

        Raises:
            TypeError, ValueError: both or neither, or one that it cannot have; what it takes is named.
        """
        return self.revised(**_given(self, k, share))

    def revised(self, **changes: Any) -> Selector:
        """The same with other settings; k and share are the whole budget's, as in :meth:`with_budget`.

        Raises:
            TypeError: a setting that it lacks; the nearest is named.
            ValueError: a value that it refuses.
        """
        if not changes:
            return self
        check_settings(self, changes)
        asked = {name: changes.pop(name) for name in BUDGET if name in changes}
        return self._made(**changes, **(self._budgeted(**_given(self, **asked)) if asked else {}))

    def weighted(self) -> tuple[nn.Module, ...]:
        """The modules that hold weights, in it and in what it wraps."""
        return (self,) if isinstance(self, nn.Module) else ()

    def accumulate(  # noqa: B027 (most look at nothing)
        self, shown: Attended, selection: Selection | None = None, weights: Tensor | None = None
    ) -> None:
        """Take note of a call; of each position once.

        Args:
            shown: its queries and the keys, all of which they attended to.
            selection: unless they kept these; only of a single query, and if it is asked one by one.
            weights: then its softmax weights over them, [B, Hq, 1, K].
        """

    def refresh(  # noqa: B027
        self, sums: AttentionSums, keys: Tensor, starts: Sequence[int], layer: int
    ) -> None:
        """Bring sums up to date before a search; keys [B, Hkv, N, D] and the rows' first columns are the cache's."""

    def refuses(self, encoder: MakesCodes, index: HoldsCodes, attend: Weighs) -> str | None:
        """Why it cannot work with these parts, and what would fit, as the end of a sentence; None if it can."""
        return None

    def rule(self, group: int) -> Rule | None:
        """What it asks of a fused decode step, for `group` query heads a KV head; None if a Rule cannot say it."""
        return None

    def learned(self) -> tuple[float, ...]:
        """The weights that its rule is made of, as they are now: another rule is due when these have changed."""
        return ()

    def _budgeted(self, k: int | None = None, share: float | None = None) -> dict[str, Any]:
        """The settings that give it this budget, of which exactly one is given."""
        takes = ", ".join(f"{name}=" for name in self.settings())
        raise ValueError(
            f"{'k' if share is None else 'share'} cannot be given to {type(self).__name__}, which counts its keys by "
            f"other means{f': {takes} would work' if takes else ''}"
        )

    def _made(self, **settings: Any) -> Self:
        """The same with these of its own settings."""
        return dataclasses.replace(self, **settings)  # type: ignore[type-var]

    def __or__(self, other: Selector) -> Joined:
        if not isinstance(other, Selector):
            return NotImplemented
        return Joined.of(self, other)


def check_settings(selector: Selector, changes: dict[str, Any]) -> None:
    """Raise TypeError for a setting that a selector lacks; k and share are for it to answer."""
    known = selector.settings()
    for name in changes:
        if name not in known and name not in BUDGET:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise TypeError(f"{name!r} is no setting{nearest_word(name, known)} of {type(selector).__name__}; {has}")


def nearest_word(word: str, known: Any) -> str:
    """A hint at the known word that is nearest to one that is not, as the middle of a sentence; "" if none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _given(selector: Selector, k: int | None = None, share: float | None = None) -> dict[str, Any]:
    """Whichever of the two is given, checked."""
    check_one(type(selector).__name__, k, share)
    return {"k": k} if k is not None else {"share": share}


@dataclass(frozen=True)
class Forced(Selector):
    """Keeps keys by position: the first `sinks` and the last `recents` visible ones. Made by Sink and Recent."""

    ranked = False
    needs_distances = False

    @property
    def shared(self) -> bool:
        return True

    def budget(self, visible: int, forced: int = 0) -> int:
        return min(visible, max(forced, self.sinks + self.recents))

    def select(self, view: View, step: Step) -> Selection:
        return Selection(forced_ids(view, self.sinks, self.recents))

    def rule(self, group: int) -> Rule | None:
        return by_position(self.sinks, self.recents, group)


def by_position(sinks: int, recents: int, group: int) -> Rule:
    """The rule that keeps these alone, for all heads of a group."""
    return Rule(k=max(1, sinks + recents), shared=group > 1, sinks=sinks, recents=recents)


def forced_slots(view: View, ids: Tensor) -> Tensor:
    """bool as ids [B, H, T, K]: which slots hold one of the view's forced keys."""
    first, end = (x[:, None, :, None] for x in view.visible.unbind(-1))  # [B, 1, T, 1]
    return (ids >= 0) & ((ids < first + view.sinks) | (ids >= end - view.recents))


@dataclass(frozen=True)
class Joined(Selector):
    """Forced parts and at most one ranked selector, written `Sink(4) | Recent(64) | TopK(share=0.05)`.

    Forced keys are ranked before every distance and count in the ranked selector's budget; where the budget is
    smaller than their number, they alone are kept, unless the ranked selector has a floor (`min_k`).
    """

    parts: tuple[Selector, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts or not all(isinstance(p, Selector) for p in self.parts):
            raise TypeError(f"parts must be a tuple of selectors, at least one, got {self.parts!r}")
        ranked = [p for p in self.parts if not isinstance(p, Forced)]
        if len(ranked) > 1:
            raise ValueError(
                f"`|` joins forced parts (Sink, Recent) with one ranked selector, got {len(ranked)}: {ranked}"
            )

    @classmethod
    def of(cls, *selectors: Selector) -> Joined:
        """What `|` makes."""
        return cls(tuple(p for s in selectors for p in (s.parts if isinstance(s, Joined) else (s,))))

    @cached_property
    def ranked_part(self) -> Selector | None:
        """The one that ranks, if there is one."""
        return next((p for p in self.parts if not isinstance(p, Forced)), None)

    @property
    def ranked(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.ranked

    @property
    def samples(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.samples

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        return self.ranked_part is not None and self.ranked_part.accumulates

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
        return max(p.sinks for p in self.parts)

    @property
    def recents(self) -> int:
        return max(p.recents for p in self.parts)

    def budget(self, visible: int, forced: int = 0) -> int:
        forced = self._forced(visible, forced)
        return forced if self.ranked_part is None else max(forced, self.ranked_part.budget(visible, forced))

    def critical(self, visible: int, forced: int = 0) -> int:
        forced = self._forced(visible, forced)
        return forced if self.ranked_part is None else max(forced, self.ranked_part.critical(visible, forced))

    def keys_read(self, visible: int, forced: int = 0) -> int:
        return 0 if self.ranked_part is None else self.ranked_part.keys_read(visible, self._forced(visible, forced))

    def choices(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        part = self.ranked_part
        return super().choices(q_heads, kv_heads) if part is None else part.choices(q_heads, kv_heads)

    def name(self) -> str:
        return " | ".join(part.name() for part in self.parts)

    def settings(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.settings().items()}

    def revised(self, **changes: Any) -> Selector:
        check_settings(self, changes)
        ranked, parts = self.ranked_part, []
        for part in self.parts:
            takes = {*part.settings(), *(BUDGET if part is ranked else ())}
            own = {name: value for name, value in changes.items() if name in takes}
            parts.append(part.revised(**own) if own else part)
        asked = {name: changes[name] for name in BUDGET if name in changes and ranked is None}
        return Joined(tuple(parts))._of_positions(**asked) if asked else Joined(tuple(parts))

    def weighted(self) -> tuple[nn.Module, ...]:
        return tuple(module for part in self.parts for module in part.weighted())

    def accumulate(self, shown: Attended, selection: Selection | None = None, weights: Tensor | None = None) -> None:
        if self.ranked_part is not None:
            self.ranked_part.accumulate(shown, selection, weights)

    def refresh(self, sums: AttentionSums, keys: Tensor, starts: Sequence[int], layer: int) -> None:
        if self.ranked_part is not None:
            self.ranked_part.refresh(sums, keys, starts, layer)

    def refuses(self, encoder: MakesCodes, index: HoldsCodes, attend: Weighs) -> str | None:
        return self.ranked_part.refuses(encoder, index, attend) if self.ranked_part is not None else None

    def rule(self, group: int) -> Rule | None:
        if self.ranked_part is None:
            return by_position(self.sinks, self.recents, group)
        ranked = self.ranked_part.rule(group)
        return replace(ranked, sinks=self.sinks, recents=self.recents) if ranked is not None else None

    def learned(self) -> tuple[float, ...]:
        return () if self.ranked_part is None else self.ranked_part.learned()

    def select(self, view: View, step: Step) -> Selection:
        if self.ranked_part is None:
            return Selection(forced_ids(view, self.sinks, self.recents))
        sinks, recents = max(self.sinks, view.sinks), max(self.recents, view.recents)  # an outer Joined's stay forced
        sinks, recents = min(sinks, view.keys), min(recents, view.keys)
        return self.ranked_part.select(replace(view, sinks=sinks, recents=recents), step)

    def _forced(self, visible: int, forced: int) -> int:
        return min(visible, max(forced, self.sinks + self.recents))

    def _of_positions(self, k: int | None = None, share: float | None = None) -> Selector:
        """Of forced parts alone: as many keys, the sinks that there are and a window."""
        if k is None or share is not None:
            takes = ", ".join(f"{name}=" for name in self.settings())
            raise ValueError(f"share={share!r} cannot be given to a window of fixed size: k=, {takes} would work")
        if "recent" not in self.settings() or k <= self.sinks:
            raise ValueError(f"k must leave room for a window (Recent) beside {self.sinks} sinks, got {k}")
        return self.revised(recent=k - self.sinks)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))
