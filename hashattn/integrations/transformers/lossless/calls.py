"""Calls: the calls of a model that one generate() makes, and the columns that its cache holds."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.utils.generic import ModelOutput

from hashattn.integrations.attached.mask import read_padding
from hashattn.integrations.attached.passes import Passes
from hashattn.integrations.transformers.graphs import Graphs
from hashattn.integrations.transformers.lossless.rows import Rows
from hashattn.integrations.transformers.lossless.writer import Writer

CACHES = ("cache", "past_key_values")
PREFILL, CHECK, PLAIN = "prefill", "check of a draft", "no draft"


class Calls:
    """Calls of a model on a cache that they fill. Those of full attention are told from those that search.

    Args:
        graphs: of the model; None where none are wanted.
        kwargs: of the model, as generate() prepares them.

    Attributes:
        rows: of the batch, where they go on apart; None where all accept as many tokens as the row that accepts least.
    """

    def __init__(self, model: Any, passes: Passes, graphs: Graphs | None, kwargs: dict[str, Any]) -> None:
        self._model, self._passes, self._graphs, self._kwargs = model, passes, graphs, kwargs
        self._cache: Cache | None = None
        self.rows: Rows | None = None

    @property
    def cache(self) -> Any:
        """None before the prefill."""
        return self._cache

    def prefill(self, ids: Tensor, config: GenerationConfig) -> Any:
        """Run the prompt, as generate() does.

        Raises:
            ValueError: a cache that cannot take back what was drafted.
        """
        with self._passes.densely(PREFILL):
            outputs = self._model._prefill(ids, config, self._kwargs, is_first_iteration=True)
        self._cache = next((outputs[name] for name in CACHES if name in outputs), None)
        if self._cache is None:
            raise ValueError("drafts need a cache that they can be taken back from: leave use_cache at True")
        for number, layer in enumerate(self._cache.layers):
            if not layer.is_croppable:
                raise ValueError(
                    f"layer {number} of the cache, a {type(layer).__name__}, cannot take back what was drafted: attach "
                    "without check"
                )
        self._cache.activate_past_recording()
        self._kwargs = self._grown(outputs, 1)
        return outputs

    def apart(self, batch: int) -> None:
        """Let rows go on apart, if their cache and the model's arguments allow that."""
        if Rows.why_not(self.cache, self._kwargs) is None:
            mask, columns = self._kwargs.get("attention_mask"), int(self.cache.get_seq_length())
            starts = [0] * batch if mask is None else read_padding(mask, batch, columns)[0]
            offsets = (self._kwargs["position_ids"][:, -1] - columns).expand(batch)
            self.rows = Rows(self.cache, starts, offsets, self._take_back, self._begin_at)

    def search(self, writer: Writer, drafted: int) -> Tensor:
        """The logits [B, vocabulary] after the texts and so many drafted tokens, by a step that searches."""
        logits: Tensor = self._call(writer, 1, drafted).logits[:, -1]
        return logits

    def check(self, writer: Writer, drafted: int) -> Any:
        """Run the texts' last tokens, and those drafted behind them, with full attention."""
        with self._passes.densely(CHECK if drafted else PLAIN):
            return self._call(writer, drafted + 1, drafted)

    def wrote(self, tokens: int) -> None:
        """So many tokens more are part of the texts, where rows go on together."""
        if self.rows is None:
            self._kwargs = self._grown(ModelOutput(), tokens)

    def take_back(self, columns: int) -> None:
        """Let the cache forget its last columns, which were drafted."""
        if self.rows is not None:
            self.rows.take_back(columns)
        elif self._graphs is None or not self._graphs.take_back(self.cache, columns):
            self.cache.crop(-columns)

    def keep(self, kept: list[int], appended: int) -> None:
        """Keep the first columns of each row that a check appended, and let windows forget what these are far from."""
        if self.rows is not None:
            self.rows.settle(kept, appended)
        else:
            self.take_back(appended - min(kept))

    def end(self) -> None:
        """Leave the cache as any other."""
        if self.rows is not None:
            self.rows.restore()
        for layer in self._cache.layers if self._cache is not None else []:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def _call(self, writer: Writer, tokens: int, drafted: int) -> Any:
        if self.rows is not None:
            ahead = drafted if tokens == 1 else 0
            ids, given = writer.tokens(ahead, tokens), self._kwargs | self.rows.given(tokens, ahead)
        else:
            ids, given = writer.text(drafted), self._grown(ModelOutput(), drafted) if drafted else self._kwargs
        inputs = self._model.prepare_inputs_for_generation(ids, next_sequence_length=tokens, **given)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = tokens
        return self._model(**inputs, return_dict=True)

    def _take_back(self, columns: int) -> None:
        """From layers that keep all columns."""
        if not columns:
            return
        if self._graphs is None or not self._graphs.take_back(self.cache, columns):
            for layer in self.cache.layers:
                if not isinstance(layer, DynamicSlidingWindowLayer):
                    layer.crop(-columns)

    def _begin_at(self, starts: list[int], earlier: bool) -> None:
        if self._graphs is not None:
            self._graphs.begin_at(self.cache, starts, earlier)

    def _grown(self, outputs: Any, tokens: int) -> dict[str, Any]:
        """What the model is to be given once the text is so many tokens longer."""
        grown: dict[str, Any] = self._model._update_model_kwargs_for_generation(
            outputs, copy.copy(self._kwargs), num_new_tokens=tokens
        )
        return grown
