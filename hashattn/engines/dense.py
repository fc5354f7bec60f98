"""Dense: full attention, no index."""

from __future__ import annotations

from torch import Tensor

from hashattn.attend.dense import dense
from hashattn.cache.kv_cache import KVCache
from hashattn.core.attention_sums import Attended
from hashattn.engines.base import Answer, Call, Engine, PlanRow, PreparedStep, Request
from hashattn.engines.parts import Parts
from hashattn.selectors.base import Selector


class Dense(Engine):
    """Every query attends to every key that it sees."""

    name = "dense"
    searches = False
    captures = True

    def why_not(self, parts: Parts, request: Request) -> list[str]:
        return []

    def prepare(self, parts: Parts, request: Request) -> PreparedStep:
        def step(q: Tensor, cache: KVCache, call: Call) -> Answer:
            show(parts.selector, q, cache, call)
            seen = cache.seen(q.shape[2], call.causal)
            wanted = {"need_lse": call.need_lse, "need_weights": call.need_weights}
            return dense(q, cache.keys, cache.values, seen, call.scale, **wanted), None

        return step

    def rows(self, parts: Parts, request: Request) -> list[PlanRow]:
        return [PlanRow("attend", "full attention (PyTorch SDPA, grouped heads)")]


def show(selector: Selector | None, q: Tensor, cache: KVCache, call: Call) -> None:
    """Show a selector that looks back what full attention of these queries attends to, at no position twice."""
    if selector is None or not selector.accumulates or cache.longest == 0:
        return
    tokens = q.shape[2]
    known = max(0, cache.attention_sums.queries.end - (len(cache) - tokens))
    if known < tokens:
        spans = cache.spans(tokens, call.causal)
        shown = Attended(cache.attention_sums, q.detach(), cache.keys, spans, call.scale, call.step.layer)
        selector.accumulate(shown.part(known, tokens) if known else shown)
