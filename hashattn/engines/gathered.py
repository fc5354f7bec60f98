"""Gathered: a selector that looks at no codes chooses in PyTorch, and one kernel attends to what it chose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from hashattn.attend.base import Attend, Keys
from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import Output, Selection
from hashattn.engines.base import Answer, Call, Request
from hashattn.engines.fused import wants_gradients
from hashattn.engines.parts import Parts
from hashattn.engines.stages import Reference, Stages
from hashattn.index.view import View
from hashattn.ops import decode
from hashattn.ops.decode.request import why_not_here, why_not_shape


class InOneKernel(Attend):
    """ExactAttend on a GPU; log-weights are not read, which selectors that sample nothing do not give."""

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
        from hashattn.ops.attend.on_gpu import attend  # imports Triton

        assert selection is not None
        keys, values, ids = cache.selected(selection.ids)
        out, lse, weights = attend(q, keys, values, ids, scale, need_weights)
        return Output(out, lse if need_lse else None, weights)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Steps of parts that :func:`why_not_gathered` lets pass."""

    parts: Parts
    request: Request

    @cached_property
    def stages(self) -> Stages:
        return Stages(replace(self.parts, attend=InOneKernel()), host=False)

    def __call__(self, q: Tensor, cache: KVCache, call: Call) -> Answer:
        if wants_gradients(self.parts, q, cache):
            return Reference().prepare(self.parts, self.request)(q, cache, call)
        return self.stages(q, cache, call)


def why_not_gathered(parts: Parts, request: Request) -> list[str]:
    """Why the kernel does not attend to what a selector chooses: every reason."""
    heads = request.q_heads, request.kv_heads, request.head_dim
    asked = decode.KernelRequest(request.device, request.dtype, *heads, 0, 1, decode.Rule(k=1), "", request.batch)
    reasons = why_not_here(asked) or why_not_shape(replace(asked, tokens=request.tokens))
    if parts.encoder is not None or parts.selector is None or parts.selector.samples or parts.attend.needs_norms:
        reasons.append("it attends to what selectors choose that rank nothing and sample nothing")
    if request.captured:
        reasons.append("its selector chooses in PyTorch, which graphs do not hold")
    return reasons
