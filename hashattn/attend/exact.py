"""ExactAttend: exact logits for every selected key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.attend.base import Attend, Keys, head_logits, softmax_over
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
        keys, values = cache.gather("keys", selection.ids), cache.gather("values", selection.ids)
        return softmax_over(head_logits(q, keys) * scale, selection, values, q.dtype, need_lse, need_weights)
