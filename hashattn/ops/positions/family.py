"""No scores at all: the first and the last keys that a query sees are all that it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.request import KernelRequest
from hashattn.ops.select.family import Family, Scores


class Positions(Family):
    """Serves rules that keep as many keys as are forced. There are no codes."""

    scores = "positions"

    def why_not(self, request: KernelRequest) -> list[str]:
        rule = request.rule
        if rule.k == max(1, rule.sinks + rule.recents) and rule.radius is None and not rule.min_k:
            return []
        return ["without an index it serves Sink and Recent alone"]

    def distances(self, x: Inputs, filled: int) -> Tensor:
        return torch.zeros(*x.q.shape[:3], filled, dtype=torch.int32, device=x.q.device)

    def in_triton(self, like: Inputs) -> Scores | None:
        return None
