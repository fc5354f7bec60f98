"""Reading a text densely, as decoding finds it, and what a model can read and how it ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.lab.workload.model import cache_argument

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 1024


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, ids: Tensor, cache: DynamicCache | None = None, *, tick: Callable[[int], Any] | None = None
) -> DynamicCache:
    """Keys and values of ids [1, N], computed densely in chunks; behind those of a copy of `cache`, if given.

    Args:
        tick: told the length of every chunk that was read.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cache is None else copy.deepcopy(cache)
    for chunk in ids.split(CHUNK, 1):
        model(input_ids=chunk.to(model.device), **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
        if tick is not None:
            tick(chunk.shape[1])
    return cache


def positions_of(model: PreTrainedModel) -> int | None:
    """The longest text that the model takes; None if it does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text, for the tokenizer or for the model."""
    config = model.generation_config
    own = config.eos_token_id if config is not None else None
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(end for end in ends if isinstance(end, int))
