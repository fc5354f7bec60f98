"""Who generates: the model as it is, and presets attached to it, each with a dynamic and with a static cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hashattn.attend import ExactAttend
from hashattn.attention import HashAttention
from hashattn.lab.evaluation.contenders import Contender as Preset
from hashattn.lab.evaluation.contenders import written
from hashattn.presets import takes_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hashattn.integrations.transformers import Handle

STOCK, DYNAMIC, STATIC, AGAIN = "stock", "dynamic", "static, compiled", "lengths seen before"


@dataclass(frozen=True)
class Contender:
    """One way to generate.

    Attributes:
        preset: what is attached; None for the model as it is.
        static: with a static cache and the model compiled for it, by transformers.
        graph: attach()'s argument of this name; None leaves it out.
        again: the call before went over the same lengths, for which cuDNN has its plans by then.
    """

    preset: Preset | None
    static: bool
    graph: str | None = None
    again: bool = False

    @property
    def label(self) -> str:
        """What tables call it."""
        name = f"{STOCK if self.preset is None else self.preset.label}, {STATIC if self.static else DYNAMIC}"
        return f"{name}, {AGAIN}" if self.again else name

    def composition(self, tokens: int) -> HashAttention | None:
        """What is attached for texts of so many tokens."""
        return None if self.preset is None else self.preset.composition(tokens)

    @contextlib.contextmanager
    def attached(
        self, network: PreTrainedModel, attn: HashAttention | None
    ) -> Iterator[tuple[PreTrainedModel, Handle | None]]:
        """A model within a block, to which a composition is attached; nothing for None."""
        if attn is None:
            yield network, None
            return
        options: dict[str, Any] = {} if self.graph is None else {"graph": self.graph}
        with attn.attach(network, **options) as handle:
            yield network, handle


def contenders(
    presets: Sequence[str], budget: float | None, *, compiled: bool, graph: str | None = None, again: bool = False
) -> list[Contender]:
    """The model as it is first, then every preset, in each of the ways.

    Args:
        presets: as :func:`hashattn.presets.parsing.parse` takes them.
        budget: share of the keys, for presets that take one; None is each preset's own.
        compiled: whether static caches, for which the model is compiled, are among the ways.
        again: whether the model as it is, with a dynamic cache, is also called over lengths that were seen before.

    Raises:
        ValueError, TypeError: what the presets refuse; a preset that is named twice.
        RuntimeError: a preset whose encoder must be fitted first.
    """
    if len(set(presets)) < len(presets):
        raise ValueError(f"--preset: name each once, got {', '.join(presets)}")
    named = [
        Preset(text, name, options, budget if takes_budget(name, options) else None)
        for text, name, options in written(presets)
    ]
    for preset in named:
        attn = preset.composition(4096)
        try:
            every_key(attn)
        except (ValueError, TypeError) as error:
            raise ValueError(f"--preset {preset.label} cannot be checked with a budget of every key: {error}") from None
        if attn.encoder is not None:
            attn.encoder.check_fitted()
    ways = (False, True) if compiled else (False,)
    found = [Contender(preset, static, graph) for preset in (None, *named) for static in ways]
    return [found[0], *([replace(found[0], again=True)] if again else []), *found[1:]]


def every_key(attn: HashAttention) -> HashAttention:
    """The composition with a budget of everything: it must write what full attention writes.

    Raises:
        ValueError, TypeError: it has no budget.
    """
    if attn.selector is None:
        return attn
    return attn.replace(selector=attn.selector.with_budget(share=1.0), attend=ExactAttend(), dense_layers=())
