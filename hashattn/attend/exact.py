"""ExactAttend: exact logits for every selected key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.attend.base import Attend, Keys, on_host
from hashattn.core.types import Output, Selection
from hashattn.index.view import View
from hashattn.ops import attend as ops


@dataclass(frozen=True)
class ExactAttend(Attend):
    """Gathers the selected keys and values and attends to them exactly; tiers are ignored.

    Its error is bounded by the attention mass that the selection misses: |out - dense| <= 2 (1 - mass) max|v|.
    """

    @property
    def fused(self) -> bool:
        return True

    def attend(
        self,
        q: Tensor,
        cache: Keys,
        selection: Selection | None,
        scale: float,
        *,
        view: View | None = None,
        need_lse: bool = False,
        need_weights: bool = False,
    ) -> Output:
        if selection is None:
            raise ValueError("ExactAttend needs a selection; DenseAttend does without")
        keys, values, ids = cache.selected(selection.ids)
        host = on_host(view, selection, q, keys, values)
        rows = ops.row_numbers(ids, keys.shape[1], keys.shape[2])
        logits = ops.logits(q, keys, ids, scale, rows=rows, host=host)
        return Output(
            *ops.weigh(
                logits,
                values,
                ids,
                q.dtype,
                log_weights=selection.log_weights,
                rows=rows,
                need_lse=need_lse,
                need_weights=need_weights,
                host=host,
            )
        )
