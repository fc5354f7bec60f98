"""Sample: the queries and keys of one layer and one text, which encoders are fitted to and judged by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """Post-RoPE queries and keys of one attention layer over one sequence.

    Attributes:
        q: float32 [Hq, T, D], some of the sequence's queries.
        k: float32 [Hkv, N, D], all of its keys.
        positions: int64 [T], the column of each query, ascending; it sees the keys 0 .. position.
        prefill: columns below this were prefilled, those from it on decoded.
        name: of the sequence.
        kind: what it is: "text", or the retrieval task.
        asked: the column where a question about what stands before begins; None if there is none.
    """

    q: Tensor
    k: Tensor
    positions: Tensor
    prefill: int
    name: str = ""
    kind: str = "text"
    asked: int | None = None

    def __post_init__(self) -> None:
        q, k, positions = self.q, self.k, self.positions
        if q.ndim != 3 or k.ndim != 3 or q.shape[-1] != k.shape[-1] or q.shape[0] % k.shape[0]:
            raise ValueError(
                f"q [Hq, T, D] and k [Hkv, N, D] with Hq a multiple of Hkv were expected, got {(*q.shape,)} and "
                f"{(*k.shape,)}"
            )
        if positions.shape != (q.shape[1],) or positions.is_floating_point():
            raise ValueError(f"positions must be {q.shape[1]} integers, one a query, got {(*positions.shape,)}")
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < k.shape[1]:
            raise ValueError(f"positions must be columns of the {k.shape[1]} keys, got up to {int(positions.max())}")

    def question(self) -> Sample | None:
        """The same with the queries of the question and its prefilled answer alone; None if there are none."""
        within = (self.positions >= (self.prefill if self.asked is None else self.asked)) & (
            self.positions < self.prefill
        )
        if not bool(within.any()):
            return None
        return replace(self, q=self.q[:, within], positions=self.positions[within])
