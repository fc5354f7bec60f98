"""A prefilled text and the tokens that go on from it: what full and sparse attention make of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.workload.model import cache_argument

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Continuation:
    """Tokens to run after a prefilled text.

    Attributes:
        cache: dense keys and values of the text; None if all is run in one call without a cache.
        ids: int64 [1, S], what is run.
        kept: int64 [A], which of these S positions' predictions are judged.
        targets: int64 [A], the tokens that should be predicted there.
    """

    cache: DynamicCache | None
    ids: Tensor
    kept: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Verdict:
    """What one way of attending made of a continuation.

    Attributes:
        nll: of the targets, nats a token, mean.
        correct: whether every target was the likeliest token, so that greedy decoding would have written them.
        reads: keys and bytes read a step; empty for the model as it is.
    """

    nll: float
    correct: bool
    reads: dict[str, float]


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: Tensor, cache: DynamicCache | None = None) -> DynamicCache:
    """Keys and values of ids [1, N], computed densely in chunks; behind those of a copy of `cache`, if given."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cache is None else copy.deepcopy(cache)
    for first in range(0, ids.shape[1], CHUNK):
        chunk = ids[:, first : first + CHUNK].to(model.device)
        model(input_ids=chunk, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
    return cache


def last(cache: DynamicCache | None, ids: Tensor, targets: Tensor) -> Continuation:
    """The last A of the ids [1, S] should predict the targets [1, A]."""
    kept = torch.arange(ids.shape[1] - targets.shape[1], ids.shape[1])
    return Continuation(cache, ids, kept, targets[0])


@torch.inference_mode()
def judge(model: PreTrainedModel, continuation: Continuation, attn: HashAttention | None = None) -> Verdict:
    """Run a continuation, with a composition at every position or with the model as it is (None).

    Every query of the continuation searches; the cache itself was filled densely, and is not changed.
    """
    cache = copy.deepcopy(continuation.cache)
    given: dict[str, Any] = {"use_cache": False} if cache is None else {cache_argument(model): cache, "use_cache": True}
    given |= {"input_ids": continuation.ids.to(model.device), "logits_to_keep": continuation.kept.to(model.device)}
    if attn is None:
        logits, reads = model(**given).logits, {}
    else:
        with attn.attach(model, simulate=True) as handle:
            logits = model(**given).logits
            report = handle.report()
        reads = {
            "keys_read": report.keys_read, "sparse_keys_read": report.sparse_keys_read,
            "bytes_read": report.bytes_per_step, "dense_bytes": report.dense_bytes_per_step,
        }  # fmt: skip
    logits, targets = logits[0].float().cpu(), continuation.targets
    nll = float(F.cross_entropy(logits, targets))
    return Verdict(nll, bool((logits.argmax(-1) == targets).all()), reads)
