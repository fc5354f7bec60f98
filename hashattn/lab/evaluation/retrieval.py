"""Retrieval questions: the right answer, teacher-forced, after a prompt that was prefilled densely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hashattn.lab.evaluation.continuation import Continuation, last
from hashattn.lab.workload.prefill import prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hashattn.lab.workload.retrieval import Question

PROTOCOLS = ("dense question", "sparse question")


def continuations(model: PreTrainedModel, question: Question) -> dict[str, Continuation]:
    """By protocol: with the question prefilled densely, so that only the answer is sparse, and with both sparse.

    Accuracy and likelihood come from one call with the right answer: where each of its tokens is the likeliest, greedy
    decoding would have written it.
    """
    ids, answer, asked = question.ids, question.answer, question.asked
    context = prefill(model, ids[:, :asked])
    whole = prefill(model, ids[:, asked:-1], context)
    told = answer[:, :-1]
    return {
        "dense question": last(ids[:, :-1], whole, torch.cat([ids[:, -1:], told], 1), answer),
        "sparse question": last(ids[:, :asked], context, torch.cat([ids[:, asked:], told], 1), answer),
    }
