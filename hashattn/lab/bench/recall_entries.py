"""What is compared: presets, each with its own index and, if one is asked for, another, fitted to a layer."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hashattn import index as indexes
from hashattn.attention import HashAttention
from hashattn.encoders.base import Encoder
from hashattn.encoders.learned import LearnedHash
from hashattn.fitted.saving import Pretrained, from_pretrained, shipped
from hashattn.index import Index
from hashattn.lab.bench.recall_data import CapturedLayer
from hashattn.lab.evaluation.contenders import Contender
from hashattn.presets import PRESETS, budget_options, takes_budget
from hashattn.presets.parsing import parse

Memo = dict[tuple[Any, ...], Encoder]

SHIPPED = "shipped"  # with the library


@dataclass(frozen=True)
class Entry:
    """One line of the table: a preset, at a budget if it takes one, with another index if there is one.

    Attributes:
        contender: the preset.
        index: in place of its own, if there is one.
        written: what to call the index.
    """

    contender: Contender
    index: Index | None = None
    written: str = ""

    @property
    def label(self) -> str:
        return self.contender.label if self.index is None else f"{self.contender.label} + {self.written}"

    def composition(self, tokens: int, seed: int = 0) -> HashAttention:
        """As it is before fitting.

        Raises:
            ValueError: the index does not fit the preset.
        """
        attn = self.contender.composition(tokens, seed=seed)
        return attn if self.index is None else attn.replace(index=self.index)

    def fitted(
        self, layer: CapturedLayer, pretrained: Sequence[Pretrained], memo: Memo, *, steps: int, seed: int
    ) -> tuple[HashAttention, str]:
        """The composition for a layer, and where its encoder's weights are from: "" where it has none.

        Encoders that come with the library serve where they are what the preset would train; else the encoder is
        fitted to the layer's other text.

        Args:
            pretrained: encoders of the model, if there are any.
            memo: learned encoders of this data, which presets share.
            steps: of the training of learned ones.
        """
        tokens = layer.k.shape[2]
        attn = self.composition(tokens, seed).layer(layer.number)
        encoder = attn.encoder
        if encoder is None or not hasattr(encoder, "fit"):
            return attn, ""
        if getattr(encoder, "fitted", False):
            return attn, "given"
        if not isinstance(encoder, LearnedHash):
            encoder.fit(layer.fit_q, layer.fit_k)
            return attn, "fitted here"
        key = arguments(encoder)
        for loaded in pretrained:
            if layer.number in loaded.encoder.layers and arguments(loaded.encoder.layer(layer.number)) == key:
                options = {**self.contender.options, "pretrained": loaded}
                whole = replace(self, contender=replace(self.contender, options=options))
                return whole.composition(tokens).layer(layer.number), SHIPPED
        if (layer.number, key) not in memo:
            encoder.fit(layer.fit_q, layer.fit_k, steps=steps, scale=layer.scale)
            memo[layer.number, key] = encoder
        return attn.replace(encoder=memo[layer.number, key]), f"trained here, {steps} steps"


def entries(
    presets: Sequence[str] | None, budget: float | None, index: str | None = None
) -> tuple[list[Entry], list[str]]:
    """Every preset at this budget where it takes one, and once more with the index where it fits; and remarks.

    Args:
        presets: as :func:`hashattn.presets.parsing.parse` takes them; all of PRESETS by default.
        budget: share of the keys; None is each preset's own.
        index: as parse_index() takes it.

    Raises:
        ValueError, TypeError: what presets refuse; an index that no preset takes.
    """
    other = parse_index(index) if index is not None else None
    found: list[Entry] = []
    remarks: list[str] = []
    for text in presets or PRESETS:
        name, options = parse(text)
        budget_options("oracle_topk", budget, 4096)  # refuses what is no share
        plain = Entry(Contender(text, name, options, budget if takes_budget(name, options) else None))
        found.append(plain)
        if other is not None and index is not None and plain.composition(4096).encoder is not None:
            swapped = Entry(plain.contender, other, index)
            try:
                swapped.composition(4096)
                found.append(swapped)
            except ValueError as error:
                remarks.append(f"{text}: {error}")
    if index is not None and not any(entry.index for entry in found):
        raise ValueError(f"--index {index} fits none of the presets: {'; '.join(remarks) or 'they have no index'}")
    return found, remarks


def parse_index(text: str) -> Index:
    """An index as Python writes it, such as FaissBinary("BHNSW32"): a name of the library's, and plain values.

    Raises:
        ValueError: anything else; what the index refuses.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("no call")
        values = [ast.literal_eval(value) for value in call.args]
        named = {str(part.arg): ast.literal_eval(part.value) for part in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"""--index must look like 'FaissBinary("BHNSW32")', got {text!r}""") from None
    kind = getattr(indexes, call.func.id, None) if call.func.id in indexes.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, Index)) or inspect.isabstract(kind):
        known = [name for name in indexes.__all__ if _is_index(getattr(indexes, name))]
        raise ValueError(f"--index: {call.func.id!r} is no index; there are {', '.join(known)}")
    try:
        return kind(*values, **named)
    except TypeError as error:
        raise ValueError(f"--index {text}: {error}") from None


def shipped_for(model: str) -> list[Pretrained]:
    """Encoders that come with the library for the model of this name."""
    return [from_pretrained(name) for name in shipped() if name == model or name.startswith(f"{model}-")]


def arguments(encoder: Encoder) -> tuple[Any, ...]:
    """What tells an encoder that is to be learned from others: its kind and arguments, but for where it starts."""
    names = [name for name in inspect.signature(type(encoder)).parameters if name not in ("seed", "centring")]
    return (type(encoder), *(getattr(encoder, name, None) for name in names))


def _is_index(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, Index) and not inspect.isabstract(part)
