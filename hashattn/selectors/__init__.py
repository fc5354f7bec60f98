"""Selectors: which keys a query keeps."""

from hashattn.selectors.base import Joined, Selector
from hashattn.selectors.consensus import Consensus
from hashattn.selectors.forced import Recent, Sink
from hashattn.selectors.local import LocalTopK
from hashattn.selectors.logit_map import LogitMap
from hashattn.selectors.momentum import Momentum
from hashattn.selectors.threshold import Threshold
from hashattn.selectors.tiers import Tiers
from hashattn.selectors.top_p import TopP
from hashattn.selectors.topk import TopK

__all__ = [
    "Consensus",
    "Joined",
    "LocalTopK",
    "LogitMap",
    "Momentum",
    "Recent",
    "Selector",
    "Sink",
    "Threshold",
    "Tiers",
    "TopK",
    "TopP",
]
