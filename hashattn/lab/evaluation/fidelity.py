"""Fidelity: how often a composition chooses the token that full attention chose, along full attention's own text."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.lab.evaluation.continuation import Continuation, last
from hashattn.lab.workload.model import cache_argument
from hashattn.lab.workload.prefill import prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def own_text(model: PreTrainedModel, ids: Tensor, tokens: int) -> Continuation:
    """What the model as it is writes behind a window [1, N], greedily; each of these tokens is to be predicted."""
    text = ids[:, :-1]
    cache = prefill(model, text)
    held, written = copy.deepcopy(cache), ids[:, -1:].to(model.device)
    for _ in range(tokens):
        given = {cache_argument(model): held, "use_cache": True}
        logits = model(input_ids=written[:, -1:], logits_to_keep=1, **given).logits[:, -1]
        written = torch.cat([written, logits.argmax(-1, keepdim=True)], 1)
    written = written.cpu()
    return last(text, cache, written[:, :-1], written[:, 1:])
