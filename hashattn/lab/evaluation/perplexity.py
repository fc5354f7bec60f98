"""Perplexity of windows of a text: their end after a dense prefill, or all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.lab.evaluation.continuation import Continuation, last
from hashattn.lab.workload.prefill import prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRIES = 1 << 27  # of logits at once


def end_of_window(model: PreTrainedModel, ids: Tensor, sparse: int) -> Continuation:
    """A window [1, N] whose last `sparse` tokens are predicted after a dense prefill of those before.

    Raises:
        ValueError: a window that is not longer than `sparse` + 1.
    """
    tokens = ids.shape[1]
    if not 1 <= sparse < tokens - 1:
        raise ValueError(f"sparse must be from 1 to {tokens - 2} in windows of {tokens} tokens, got {sparse}")
    cut = tokens - sparse
    text = ids[:, : cut - 1]
    return last(text, prefill(model, text), ids[:, cut - 1 : -1], ids[:, cut:])


def whole_window(model: PreTrainedModel, ids: Tensor) -> Continuation:
    """A window [1, N] in one call without a cache: every position is sparse.

    Every token is predicted, or as many, evenly spaced, as there is memory for their logits.
    """
    most = max(1, ENTRIES // model.config.get_text_config(decoder=True).vocab_size)
    stride = -(-(ids.shape[1] - 1) // most)
    kept = torch.arange(stride - 1, ids.shape[1] - 1, stride)
    return Continuation(None, None, ids[:, :-1], kept, ids[0, kept + 1])
