"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hashattn.core.types import Output


def merge(parts: Sequence[Output]) -> Output:
    """Attention over the union of disjoint sets of keys, from the attention over each (with its lse).

    Raises:
        ValueError: no parts, or a part without lse.
    """
    if not parts:
        raise ValueError("parts must hold at least one Output, got none")
    lses = [p.lse for p in parts if p.lse is not None]
    if len(lses) < len(parts):
        raise ValueError("every part needs its lse: attend with need_lse=True")
    lse = torch.stack(lses)  # [P, B, Hq, T]
    total = lse.logsumexp(0)
    share = (lse - total.clamp(min=torch.finfo(torch.float32).min)).exp().unsqueeze(-1)
    out = (share * torch.stack([p.out.float() for p in parts])).sum(0)
    return Output(out.to(parts[0].out.dtype), total)
