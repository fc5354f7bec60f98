"""What selectors around another one share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from hashattn.core.attention_sums import Attended, AttentionSums
from hashattn.core.kinds import HoldsCodes, MakesCodes, Weighs
from hashattn.core.types import Selection
from hashattn.selectors.base import Selector, check_settings


class Wrapper(Selector):
    """A selector around another one, to which it leaves whatever it does not do itself.

    One that calls what it wraps otherwise than `inner` says so by a property of this name, and overrides around().
    """

    if TYPE_CHECKING:

        @property
        def inner(self) -> Selector:
            """What it wraps."""

    def name(self) -> str:
        return f"{super().name()}({self.inner.name()})"

    def around(self, inner: Selector, **own: Any) -> Self:
        """The same around another selector, with these of its own settings."""
        return self._made(inner=inner, **own)

    def own_settings(self) -> dict[str, Any]:
        """Settings that are not those of the selector inside."""
        return {name: value for name, value in super().settings().items() if not isinstance(value, Selector)}

    def settings(self) -> dict[str, Any]:
        return {**self.inner.settings(), **self.own_settings()}

    def revised(self, **changes: Any) -> Self:
        check_settings(self, changes)
        own = {name: changes.pop(name) for name in self.own_settings() if name in changes}
        return self.around(self.inner.revised(**changes) if changes else self.inner, **own)

    def weighted(self) -> tuple[nn.Module, ...]:
        return (*super().weighted(), *self.inner.weighted())

    def learned(self) -> tuple[float, ...]:
        return self.inner.learned()

    @property
    def ranked(self) -> bool:  # type: ignore[override]
        return self.inner.ranked

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.inner.needs_distances

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return self.inner.matrices

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        return self.inner.needs_weights

    @property
    def samples(self) -> bool:  # type: ignore[override]
        return self.inner.samples

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        return self.inner.accumulates

    @property
    def shared(self) -> bool:
        return self.inner.shared

    @property
    def sinks(self) -> int:
        return self.inner.sinks

    @property
    def recents(self) -> int:
        return self.inner.recents

    def budget(self, visible: int, forced: int = 0) -> int:
        return self.inner.budget(visible, forced)

    def critical(self, visible: int, forced: int = 0) -> int:
        return self.inner.critical(visible, forced)

    def keys_read(self, visible: int, forced: int = 0) -> int:
        return self.inner.keys_read(visible, forced)

    def choices(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        return self.inner.choices(q_heads, kv_heads)

    @property
    def one_by_one(self) -> bool:  # type: ignore[override]
        return self.inner.one_by_one

    @property
    def follows(self) -> bool:
        return self.needs_weights or self.inner.follows

    def accumulate(self, shown: Attended, selection: Selection | None = None, weights: Tensor | None = None) -> None:
        self.inner.accumulate(shown, selection, weights)

    def refresh(self, sums: AttentionSums, keys: Tensor, starts: Sequence[int], layer: int) -> None:
        self.inner.refresh(sums, keys, starts, layer)

    def refuses(self, encoder: MakesCodes, index: HoldsCodes, attend: Weighs) -> str | None:
        return self.inner.refuses(encoder, index, attend)
