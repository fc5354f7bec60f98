"""Selectors: which keys a query keeps."""

from hashattn.selectors.base import Joined, Selector
from hashattn.selectors.collision_sample import CollisionSample
from hashattn.selectors.consensus import Consensus
from hashattn.selectors.forced import Recent, Sink
from hashattn.selectors.heavy_hitters import HeavyHitters
from hashattn.selectors.local import LocalTopK
from hashattn.selectors.logit_map import LogitMap
from hashattn.selectors.momentum import Momentum
from hashattn.selectors.observation_window import ObservationWindow, pyramid
from hashattn.selectors.random_tail import RandomTail
from hashattn.selectors.refine import Refine
from hashattn.selectors.reuse import Reuse
from hashattn.selectors.threshold import Threshold
from hashattn.selectors.tiers import Tiers
from hashattn.selectors.top_p import TopP
from hashattn.selectors.topk import TopK

__all__ = [
    "CollisionSample",
    "Consensus",
    "HeavyHitters",
    "Joined",
    "LocalTopK",
    "LogitMap",
    "Momentum",
    "ObservationWindow",
    "RandomTail",
    "Recent",
    "Refine",
    "Reuse",
    "Selector",
    "Sink",
    "Threshold",
    "Tiers",
    "TopK",
    "TopP",
    "pyramid",
]
