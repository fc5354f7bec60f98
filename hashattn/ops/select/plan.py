"""Plan: how the kernels that score, choose and attend divide their work, and the memory that they write within it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hashattn.ops.attend.constants import ROWS
from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.sizes import Buffers, nbytes, too_many

CHUNK = 2048  # keys of a program that scores
BINS = 64  # of ranks, as the choice counts them
SEGMENTS = 32  # programs of a row that list its candidates, at most
LISTS = 1024  # of all rows, about


@dataclass(frozen=True)
class Plan:
    """Of a step, from the shapes of what it is given.

    Attributes:
        code_room: columns that there is room for codes of.
        rule: in numbers no larger than the room.
        ranks: whether keys are scored at all.
    """

    batch: int
    q_heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    room: int
    code_room: int
    rule: Rule
    ranks: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for more than the kernels count."""
        object.__setattr__(self, "rule", self.rule.within(self.limit))
        reasons = too_many(self.batch, self.q_heads, self.tokens, max(self.room, self.code_room), 1, self.rule)
        if reasons:
            raise ValueError("; ".join(reasons))

    @classmethod
    def of(cls, x: Inputs) -> Plan:
        """The plan of a step on these tensors."""
        (batch, q_heads, tokens, dim), (kv_heads, room) = x.q.shape, x.stored.keys.shape[1:3]
        code_room = x.stored.codes.shape[2] * x.page
        return cls(batch, q_heads, kv_heads, tokens, dim, room, code_room, x.rule, x.scores != "positions")

    @property
    def limit(self) -> int:
        """Columns that keys, values and codes have room for."""
        return min(self.room, self.code_room)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def summed(self) -> int:
        """Query heads that make one choice."""
        return self.group if self.rule.shared else 1

    @property
    def rows(self) -> int:
        """Choices."""
        return self.batch * self.q_heads // self.summed * self.tokens

    @property
    def chunks(self) -> int:
        """Programs that score the keys of a KV head."""
        return -(-self.limit // CHUNK)

    @property
    def segment(self) -> int:
        """Chunks of a program that lists candidates."""
        return -(-self.chunks // min(SEGMENTS, max(4, LISTS // self.rows)))

    @property
    def segments(self) -> int:
        """Such programs of a row."""
        return -(-self.chunks // self.segment)

    @property
    def slots(self) -> int:
        """Columns of ids: the most keys that a choice keeps, rounded up."""
        return -(-max(1, self.rule.slots(self.limit)) // ROWS) * ROWS

    @property
    def state(self) -> tuple[int, int]:
        """Shape of what a step leaves for the next one, int32: two hints a row, which may be anything, and zeros."""
        return 4, self.rows

    @property
    def buffers(self) -> Buffers:
        """Shape and type of everything that the kernels write within a step."""
        width = 1 << (self.head_dim - 1).bit_length()
        parts = self.rows, self.slots // ROWS, self.summed
        ranked: Buffers = {
            "ranks": ((self.rows, self.limit), torch.int32),
            "counts": ((self.rows, BINS, self.chunks), torch.uint16),
            "listed": ((self.rows, self.limit), torch.int64),
        }
        return {
            **(ranked if self.ranks else {}),
            "filled": ((self.rows,), torch.int32),
            "parts": ((*parts, width), torch.float32),
            "stats": ((*parts, 2), torch.float32),
        }

    @property
    def workspace(self) -> int:
        """Bytes of a workspace that holds these."""
        return nbytes(self.buffers)
