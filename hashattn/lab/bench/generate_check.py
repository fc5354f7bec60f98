"""Correctness first: attached with a budget of every key, a preset must write the tokens of the model as it is."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.core.errors import Failure
from hashattn.lab.bench.cuda_graphs import first_line
from hashattn.lab.bench.generate_clock import Call
from hashattn.lab.bench.generate_contenders import Contender, every_key
from hashattn.lab.bench.generate_models import random_prompt
from hashattn.lab.workload.model import sharing_weights
from hashattn.selectors import Recent, Sink

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, KEYS, TOKENS = 2, 600, 8  # enough keys for every centre
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.01}  # of the logits' norm, by rounding
BLIND = 4  # nor may they be off by more than a fourth of what attention to two keys alone is

Written = tuple[Tensor, Tensor]  # tokens [B, T] and their logits [T, B, vocabulary]


def failing(network: PreTrainedModel, contenders: Sequence[Contender]) -> dict[str, str]:
    """Why contenders must not be measured, by label; the model as it is, with a dynamic cache, comes first."""
    ids = random_prompt(network, ROWS, KEYS)
    stock = _write(network, contenders[0], None, ids)
    two_keys = HashAttention(selector=Sink(1) | Recent(1)).searching(network.device)
    blind = _off(stock, _write(network, contenders[0], two_keys, ids))
    allowed = min(ALLOWED[network.dtype], blind / BLIND)
    wrong = {}
    for contender in contenders[1:]:
        try:
            attn = contender.composition(KEYS)
            found = _write(network, contender, None if attn is None else _forced(every_key(attn), network), ids)
            off = _off(stock, found)
            if not off <= allowed:
                raise Failure(f"with a budget of every key its logits are off by {off:.3g} of their norm")
        except Exception as error:  # it is left out, and the others are measured
            wrong[contender.label] = first_line(error)
    return wrong


def fresh(network: PreTrainedModel) -> PreTrainedModel:
    """The model for another contender, who finds nothing that was compiled or captured before."""
    torch._dynamo.reset()
    gc.collect()
    if network.device.type == "cuda":
        torch.cuda.empty_cache()
    return sharing_weights(network)


def _forced(attn: HashAttention, network: PreTrainedModel) -> HashAttention:
    """With the fastest engine that searches at any length, where it names none."""
    forced = attn.searching(network.device)
    if forced is attn or network.device.type != "cuda":
        return forced
    try:
        fused = attn.replace(engine="gpu")
        with fused.attach(network):
            return fused
    except ValueError:  # it does not serve all of the composition
        return forced


def _write(network: PreTrainedModel, contender: Contender, attn: HashAttention | None, ids: Tensor) -> Written:
    with contender.attached(fresh(network), attn) as (own, handle):
        how = Call(contender.static).arguments(ids, TOKENS)
        out = own.generate(ids, **how, return_dict_in_generate=True, output_logits=True)  # type: ignore[operator]
        if attn is not None and attn.searches and handle is not None and not handle.report().searching_layers:
            raise Failure(f"no layer searched: {handle.report().why_none}")
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


def _off(stock: Written, found: Written) -> float:
    """How far the logits are off, as a share of their norm, at most, up to the first token of a row that differs.

    Where logits agree but for rounding, tokens differ by a near tie only; what follows such a token is another text.
    """
    same = (stock[0] == found[0]).cumprod(1).bool()
    asked = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).T  # [T, B]
    off = (found[1] - stock[1]).norm(dim=-1) / stock[1].norm(dim=-1)
    return float(off[asked].nan_to_num(torch.inf).max())
