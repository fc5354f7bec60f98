"""ExactAttend: exact logits for every selected key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.attend.base import Attend, Keys
from hashattn.ops import attend as ops
from hashattn.types import Output, Selection
from hashattn.view import View


@dataclass(frozen=True)
class ExactAttend(Attend):
    """Gathers the selected keys and values and attends to them exactly; tiers are ignored.

    Its error is bounded by the attention mass that the selection misses: |out - dense| <= 2 (1 - mass) max|v|.
    """

    def attend(
        self, q: Tensor, cache: Keys, selection: Selection | None, scale: float, *, view: View | None = None,
        need_lse: bool = False, need_weights: bool = False,
    ) -> Output:  # fmt: skip
        if selection is None:
            raise ValueError("ExactAttend needs a selection; DenseAttend does without")
        needs_gradient = torch.is_grad_enabled() and (q.requires_grad or selection.needs_gradient)
        fast = view is not None and view.engine == "cpu" and not needs_gradient
        return Output(
            *(ops.attend if fast else ops.reference)(
                q, cache.storage("keys"), cache.storage("values"), selection.ids, scale,
                log_weights=selection.log_weights, need_lse=need_lse, need_weights=need_weights,
            )
        )  # fmt: skip
