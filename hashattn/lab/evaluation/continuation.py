"""A prefilled text and the tokens that go on from it: what full and sparse attention make of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.lab.workload.model import cache_argument
from hashattn.lab.workload.prefill import prefill

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from hashattn.integrations.transformers import Report


@dataclass(frozen=True, eq=False)
class Continuation:
    """Tokens to run after a prefilled text.

    Attributes:
        text: int64 [1, N], what was prefilled; None if all is run in one call without a cache.
        cache: dense keys and values of the text; None likewise.
        ids: int64 [1, S], what is run.
        kept: int64 [A], which of these S positions' predictions are judged.
        targets: int64 [A], the tokens that should be predicted there.
    """

    text: Tensor | None
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
        matched: share of the targets that were the likeliest token.
    """

    nll: float
    correct: bool
    reads: dict[str, float]
    matched: float


def last(text: Tensor, cache: DynamicCache, ids: Tensor, targets: Tensor) -> Continuation:
    """The last A of the ids [1, S], which follow a prefilled text [1, N], should predict the targets [1, A]."""
    kept = torch.arange(ids.shape[1] - targets.shape[1], ids.shape[1])
    return Continuation(text, cache, ids, kept, targets[0])


def looks_back(attn: HashAttention) -> bool:
    """Whether it chooses by what earlier calls attended to, so that it has to be there when a text is prefilled."""
    return attn.selector is not None and attn.selector.accumulates


@torch.inference_mode()
def judge(model: PreTrainedModel, continuation: Continuation, attn: HashAttention | None = None) -> Verdict:
    """Run a continuation, with a composition at every position or with the model as it is (None).

    Every query of the continuation searches; the cache itself was filled densely, and is not changed. For a composition
    that looks back the text is prefilled again, and the tokens come one by one.
    """
    if attn is not None and continuation.text is not None and looks_back(attn):
        return _decoded(model, continuation, attn)
    cache = copy.deepcopy(continuation.cache)
    given: dict[str, Any] = {"use_cache": False} if cache is None else {cache_argument(model): cache, "use_cache": True}
    given |= {"input_ids": continuation.ids.to(model.device), "logits_to_keep": continuation.kept.to(model.device)}
    if attn is None:
        logits, reads = model(**given).logits, {}
    else:
        with attn.attach(model, simulate=True) as handle:
            logits = model(**given).logits
            report = handle.report()
        reads = reads_of(report)
    return _verdict(logits, continuation.targets, reads)


def _decoded(model: PreTrainedModel, continuation: Continuation, attn: HashAttention) -> Verdict:
    assert continuation.text is not None
    with attn.attach(model) as handle:
        cache = prefill(model, continuation.text)
        handle.reset_report()
        steps = [
            model(input_ids=token.to(model.device), **{cache_argument(model): cache}, use_cache=True).logits
            for token in continuation.ids.split(1, 1)
        ]
        reads = reads_of(handle.report())
    logits = torch.cat(steps, 1)[:, continuation.kept.to(model.device)]
    return _verdict(logits, continuation.targets, reads)


def reads_of(report: Report) -> dict[str, float]:
    """Figures of what was read and ranked: shares, keys and bytes."""
    return {
        "searched": report.searched / max(1, report.positions),
        "keys_ranked": report.keys_ranked,
        "keys_read": report.keys_read,
        "sparse_keys_read": report.sparse_keys_read,
        "bytes_read": report.bytes_per_step,
        "dense_bytes": report.dense_bytes_per_step,
    }


def _verdict(logits: Tensor, targets: Tensor, reads: dict[str, float]) -> Verdict:
    """Of logits [1, A, V]."""
    logits = logits[0].float().cpu()
    likeliest = logits.argmax(-1) == targets
    return Verdict(
        float(F.cross_entropy(logits, targets)), bool(likeliest.all()), reads, float(likeliest.float().mean())
    )
