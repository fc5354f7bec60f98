"""Options: how a model is served."""

from __future__ import annotations

from dataclasses import dataclass

AUTO, NEVER, ALWAYS = GRAPHS = "auto", "never", "always"
GRAPH = AUTO  # by default


@dataclass(frozen=True)
class Options:
    """How a model is served, as attach() was told.

    Attributes:
        strict: refuse what cannot be searched.
        max_sparse_q: queries of a call up to which it searches.
        trace: count which positions are read.
        simulate: long calls search as well, each query as if it were decoded.
        graph: whether calls of few tokens replay a graph of the model: where nothing forbids it, never, or always.
    """

    strict: bool = True
    max_sparse_q: int = 1
    trace: bool = False
    simulate: bool = False
    graph: str = GRAPH

    def __post_init__(self) -> None:
        if self.max_sparse_q < 1:
            raise ValueError(f"max_sparse_q must be at least 1, got {self.max_sparse_q}")
        if self.graph not in GRAPHS:
            raise ValueError(f"graph must be one of {', '.join(map(repr, GRAPHS))}, got {self.graph!r}")

    def refuse(self, reason: str | None) -> None:
        """Raise ValueError for a call that cannot be served for this reason, if that is wanted; None is none."""
        if reason is not None and self.strict:
            raise ValueError(f"this call cannot be served: {reason} (attach with strict=False to run it densely)")
