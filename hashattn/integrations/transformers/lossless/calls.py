"""Calls: the calls of a model that one generate() makes, and the columns that its cache holds."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.utils.generic import ModelOutput

from hashattn.integrations.attached.passes import Passes
from hashattn.integrations.transformers.graphs import Graphs

CACHES = ("cache", "past_key_values")
PREFILL, CHECK, PLAIN = "prefill", "check of a draft", "no draft"


class Calls:
    """Calls of a model on a cache that they fill. Those of full attention are told from those that search.

    Args:
        graphs: of the model; None where none are wanted.
        kwargs: of the model, as generate() prepares them.
    """

    def __init__(self, model: Any, passes: Passes, graphs: Graphs | None, kwargs: dict[str, Any]) -> None:
        self._model, self._passes, self._graphs, self._kwargs = model, passes, graphs, kwargs
        self._cache: Cache | None = None

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

    def search(self, ids: Tensor, drafted: int) -> Tensor:
        """The logits [B, vocabulary] after tokens [B, n], the last `drafted` of which are, by a step that searches."""
        logits: Tensor = self._call(ids, 1, drafted).logits[:, -1]
        return logits

    def check(self, ids: Tensor, drafted: int) -> Any:
        """Run the last tokens, those drafted and the one before, with full attention."""
        with self._passes.densely(CHECK if drafted else PLAIN):
            return self._call(ids, drafted + 1, drafted)

    def wrote(self, tokens: int) -> None:
        """So many tokens more are part of the text."""
        self._kwargs = self._grown(ModelOutput(), tokens)

    def take_back(self, columns: int) -> None:
        """Let the cache forget its last columns, and windows what they kept in case they had to."""
        if self._graphs is None or not self._graphs.take_back(self.cache, columns):
            self.cache.crop(-columns)

    def end(self) -> None:
        """Leave the cache as any other."""
        for layer in self._cache.layers if self._cache is not None else []:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def _call(self, ids: Tensor, tokens: int, drafted: int) -> Any:
        kwargs = self._grown(ModelOutput(), drafted) if drafted else self._kwargs
        inputs = self._model.prepare_inputs_for_generation(ids, next_sequence_length=tokens, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = tokens
        return self._model(**inputs, return_dict=True)

    def _grown(self, outputs: Any, tokens: int) -> dict[str, Any]:
        """What the model is to be given once the text is so many tokens longer."""
        grown: dict[str, Any] = self._model._update_model_kwargs_for_generation(
            outputs, copy.copy(self._kwargs), num_new_tokens=tokens
        )
        return grown
