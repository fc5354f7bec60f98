"""What a decode step on a GPU reads besides all codes, counted from what it chose."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.core.types import MEDIUM
from hashattn.lab.bench.cases import Case
from hashattn.lab.bench.cuda_graphs import Step, Turns
from hashattn.lab.bench.floors import Reads


def reads(case: Case, step: Step, turns: Turns) -> Reads:
    """The average of a case's layers and queries."""
    found = []
    for layer, i in turns:
        _, _, ids, *tiers = step(layer, i)
        chosen = ids >= 0
        medium = chosen & (tiers[0] == MEDIUM) if tiers else torch.zeros_like(chosen)
        kept = chosen.sum(-1).double().mean()
        found.append(torch.stack([kept, *(rows(ids, own, case) for own in (chosen & ~medium, chosen, medium))]))
    return Reads(*torch.stack(found).mean(0).tolist())


def rows(ids: Tensor, wanted: Tensor, case: Case) -> Tensor:
    """How many of the keys at ids [B, H, 1, K] are wanted, in all: one that heads of a group share counts once.

    Args:
        wanted: bool, as ids.
    """
    columns = ids.masked_fill(~wanted, case.keys).unflatten(1, (case.kv_heads, -1)).flatten(2).long()
    read = torch.zeros(case.batch, case.kv_heads, case.keys + 1, dtype=torch.bool, device=ids.device)
    return read.scatter_(2, columns, True)[..., : case.keys].sum().double()
