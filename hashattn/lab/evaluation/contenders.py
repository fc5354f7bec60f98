"""Contenders: presets with options, a budget and dense layers, as the command line names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hashattn.attention import HashAttention
from hashattn.encoders.learned import LearnedHash
from hashattn.fitted.saving import from_pretrained
from hashattn.presets import budget_options, options_of, takes_budget
from hashattn.presets.parsing import parse

FULL, EXACT = "full attention", "oracle_topk"
DENSE = ("preset", "none")


@dataclass(frozen=True)
class Contender:
    """One way of attending that is judged.

    Attributes:
        label: preset and options, as they were written.
        preset: its name.
        options: of the preset.
        budget: share of the keys; None is the preset's own.
        dense: which layers attend densely: "preset" (the preset's own), "none", or numbers such as "0,1,-1".
    """

    label: str
    preset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    dense: str = "preset"

    def composition(self, tokens: int, *, seed: int = 0) -> HashAttention:
        """For texts of so many tokens. Random hyperplanes are drawn by the seed.

        Raises:
            ValueError, TypeError: options that the preset does not take, a budget that it cannot have.
        """
        chosen = {**budget_options(self.preset, self.budget, tokens, self.options), **self.options}
        if self.dense != "preset" and "dense_layers" in options_of(self.preset):  # fitted encoders may object
            chosen["dense_layers"] = dense_layers(self.dense)
        attn = HashAttention.from_preset(self.preset, **chosen)
        if self.dense != "preset":
            attn = attn.replace(dense_layers=dense_layers(self.dense))
        encoder = attn.encoder
        if seed and "seed" not in self.options and dataclasses.is_dataclass(encoder) and hasattr(encoder, "seed"):
            attn = attn.replace(encoder=dataclasses.replace(encoder, seed=seed))
        return attn

    @property
    def key(self) -> tuple[str, float | None, str]:
        """What tells it from the others."""
        return self.label, self.budget, self.dense


def searching(attn: HashAttention, device: torch.device) -> HashAttention:
    """With an engine that searches whatever the length: "auto" would run dense where that is faster."""
    return attn.replace(engine="cpu" if device.type == "cpu" else "reference")


def contenders(
    presets: Sequence[str],
    budgets: Sequence[float | None],
    dense: Sequence[str] = ("preset",),
    pretrained: str | None = None,
) -> list[Contender]:
    """Every preset at every budget with every choice of dense layers, and exact top-k first, to compare with.

    A preset that takes no budget is there once, with its own.

    Args:
        presets: as :func:`hashattn.presets.parsing.parse` takes them.
        budgets: shares of the keys; None is each preset's own.
        dense: see :class:`Contender`.
        pretrained: fitted encoders for the presets that take some.

    Raises:
        ValueError: nothing to judge, something named twice, encoders that no preset takes; what the presets refuse.
        RuntimeError: a preset whose encoder must be fitted first.
    """
    parsed = written(presets, pretrained)
    for values in (presets, budgets, dense):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"presets, budgets and dense layers must be given, and each once, got {[*values]}")
    found = []
    for each in dense:
        if each not in DENSE:
            dense_layers(each)
        for budget in budgets:
            found.append(Contender(EXACT, EXACT, {}, budget, each))
            found += [
                Contender(text, name, options, budget if takes_budget(name, options) else None, each)
                for text, name, options in parsed
                if text not in (EXACT, "full") and (budget == budgets[0] or takes_budget(name, options))
            ]
    for contender in found:
        attn = contender.composition(4096)  # refuses what cannot be
        if attn.encoder is not None:
            attn.encoder.check_fitted()
    return found


def written(presets: Sequence[str], pretrained: str | None = None) -> list[tuple[str, str, dict[str, Any]]]:
    """(what was written, preset, options) of each; fitted encoders are among the options of the presets that take some.

    Raises:
        ValueError, TypeError: what the presets refuse; encoders that none of them takes.
    """
    parsed = [(text, *parse(text)) for text in presets]
    if pretrained is not None:
        loaded = from_pretrained(pretrained)
        kind = type(loaded.encoder.layer(loaded.encoder.layers[0]))
        takers = [options for _, name, options in parsed if takes(name, kind)]
        if not takers:
            raise ValueError(f"encoder={pretrained!r} is taken by none of the presets {', '.join(presets)}")
        for options in takers:
            options.setdefault("pretrained", loaded)
    return parsed


def takes(preset: str, kind: type) -> bool:
    """Whether a preset has an encoder of this kind, or one that learns, and then refuses other kinds by itself."""
    own = type(HashAttention.from_preset(preset).encoder)
    return own is kind or issubclass(own, LearnedHash)


def dense_layers(text: str) -> tuple[int, ...]:
    """The layers of "none" or "0,1,-1"."""
    try:
        return () if text == "none" else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'dense layers must be "preset", "none" or numbers such as "0,1,-1", got {text!r}') from None
