"""Compositions judged on the queries, keys and values of a model's layers over a text that it continued itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.core.types import Step
from hashattn.lab.evaluation import recall
from hashattn.lab.kept import Truth
from hashattn.lab.workload.model import cache_argument
from hashattn.lab.workload.prefill import prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hashattn.integrations.transformers import Captured

SHARE = 0.05  # of ranked recall where a contender names no budget


@torch.inference_mode()
def continued(model: PreTrainedModel, ids: Tensor, tokens: int, seed: int) -> Tensor:
    """ids [1, N + tokens]: the text and what the model, attending densely, draws after it (temperature 1)."""
    if tokens == 0:
        return ids
    cache, generator = prefill(model, ids[:, :-1]), torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        given = {cache_argument(model): cache, "use_cache": True}
        logits = model(input_ids=ids[:, -1:].to(model.device), logits_to_keep=1, **given).logits[0, -1]
        drawn = torch.multinomial(logits.float().cpu().softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn[None]], 1)
    return ids


@torch.inference_mode()
def judge_layers(
    model: PreTrainedModel,
    captured: dict[int, Captured],
    compositions: Sequence[tuple[HashAttention, float | None]],
    prefilled: int,
    tick: Callable[[], Any],
) -> list[dict[str, Any]]:
    """The figures of :func:`hashattn.lab.evaluation.recall.judge_layer` for each composition (and its budget).

    Returns:
        A dict for each: the means over the layers that search, and under "layers" every one's.
    """
    from hashattn.integrations.transformers import support

    modules = support.attention_modules(model)
    depth = max(modules) + 1
    steps = [Step() for _ in compositions]
    rows: list[dict[int, dict[str, float | None]]] = [{} for _ in compositions]
    for number, c in captured.items():
        scale = float(getattr(modules[number], "scaling", None) or c.q.shape[-1] ** -0.5)
        truth = Truth.of(c.q, c.k, c.v, scale)
        for i, (attn, budget) in enumerate(compositions):
            if number in {layer % depth for layer in attn.dense_layers}:
                steps[i] = Step()
                continue
            step = Step(number, steps[i].previous, steps[i].previous_weights)
            bound = attn.layer(number).to(c.q.device)
            rows[i][number], steps[i] = recall.judge_layer(bound, truth, budget or SHARE, prefilled, step)
        tick()
    found = []
    for each in rows:
        figures: dict[str, Any] = recall.mean([*each.values()])
        old, new = figures.get("recall_prefill"), figures.get("recall_decoded")
        figures["drift"] = new / old if old and new is not None else None
        figures["layers"] = each
        found.append(figures)
    return found
