"""What an engine is: what it is asked for, what a call gives it, and what a plan says of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import Output, Selection, Step
from hashattn.engines.parts import Parts
from hashattn.selectors.base import Selector


@dataclass(frozen=True)
class Request:
    """A decode step, but for the number of keys: what serves it, and from how many keys on, depends on nothing else.

    Attributes:
        tokens: queries of a row.
        threads: that a CPU's step may take; None for as many as torch uses.
        captured: whether it is replayed from a graph, so that it costs the host nothing.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int = 1
    threads: int | None = None
    captured: bool = False

    @classmethod
    def of(cls, q: Tensor, cache: KVCache) -> Request:
        """Of queries [B, Hq, T, D] to a cache."""
        return cls(q.device, q.dtype, cache.batch, q.shape[1], cache.kv_heads, cache.head_dim, q.shape[2])

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Of a key of one head."""
        return self.head_dim * self.dtype.itemsize

    @property
    def key_bytes(self) -> int:
        """Of a key and its value, in all sequences and KV heads."""
        return 2 * self.batch * self.kv_heads * self.row_bytes


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of a step gives beside queries and cache.

    Attributes:
        scale: of the logits.
        causal: each query sees the keys up to its own position; otherwise all of them.
        step: the layer's number and the previous layer's selection.
        need_lse, need_weights: what the Output carries.
    """

    scale: float
    causal: bool
    step: Step
    need_lse: bool = False
    need_weights: bool = False


class PlanRow(NamedTuple):
    """One stage of a query plan: "encode", "scan", "select" or "attend", the part and what runs it, and a remark."""

    stage: str
    part: str
    remark: str = ""


Answer: TypeAlias = tuple[Output, Selection | None]
PreparedStep: TypeAlias = Callable[[Tensor, KVCache, Call], Answer]


class Engine(ABC):
    """One way to run the stages of a composition. Every one selects what the reference selects.

    Attributes:
        name: as HashAttention(engine=name) takes it.
        searches: whether it looks for keys at all; dense attention does not.
        device: the kind of device that it is written for; None for any.
        captures: whether a Decoder makes steps of it that a CUDA graph can capture.
    """

    name: str
    searches: bool = True
    device: str | None = None
    captures: bool = False

    @abstractmethod
    def why_not(self, parts: Parts, request: Request) -> list[str]:
        """Every reason why it does not serve such a step, each as the end of a sentence; [] if it does."""

    @abstractmethod
    def prepare(self, parts: Parts, request: Request) -> PreparedStep:
        """What runs such steps; what it makes ready for a cache stays with the cache."""

    @abstractmethod
    def rows(self, parts: Parts, request: Request) -> list[PlanRow]:
        """The stages of such a step, for a query plan."""

    def crossover(self, parts: Parts, request: Request) -> int | None:
        """Visible keys from which it is faster than dense attention, as was measured; None if that is not known."""
        return None

    def measured(self, parts: Parts, request: Request) -> str:
        """Where crossover() has its figures from; "" if there are none."""
        return ""

    def runs_as(self, parts: Parts) -> tuple[str, str]:
        """(name, remark): the engine that does the work of such parts, and why it is not this one."""
        return self.name, ""


def part_name(part: object) -> str:
    """A part as a plan names it: its repr where that is short."""
    text = repr(part)
    return text if len(text) <= 60 and "\n" not in text else type(part).__name__


def selector_name(selector: Selector | None) -> str:
    """The same of a selector, which has a shorter name of its own."""
    text = repr(selector)
    return text if selector is None or (len(text) <= 60 and "\n" not in text) else selector.name()
