"""Sizes: how a fused step's kernels divide their work, and the memory that they write within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.ops.decode.rule import Rule

CHUNK = 2048  # keys of a program of the first kernel
ROWS = 64  # keys of a program of the second
_ALIGNED = 256  # bytes


@dataclass(frozen=True)
class Sizes:
    """Of a step, from the shapes of what it is given: see :func:`hashattn.ops.decode.reference.decode`."""

    batch: int
    q_heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    room: int
    code_room: int
    planes: int
    rule: Rule

    @classmethod
    def of(cls, q: Tensor, query: Tensor, keys: Tensor, codes: Tensor, rule: Rule) -> Sizes:
        """The sizes of a step on these tensors."""
        batch, q_heads, tokens, dim = q.shape
        return cls(batch, q_heads, keys.shape[1], tokens, dim, keys.shape[2], codes.shape[2], query.shape[3], rule)

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
        """Programs of the first kernel for each KV head's codes."""
        return -(-self.code_room // CHUNK)

    @property
    def slots(self) -> int:
        """Columns of ids: the most keys that a choice keeps, rounded up."""
        return -(-max(1, self.rule.slots(self.room)) // ROWS) * ROWS

    @property
    def spread(self) -> int:
        """The largest share of one bit in a distance."""
        return self.summed * (2**self.planes - 1)

    @property
    def bins(self) -> int:
        """Distances below the bound that are told apart."""
        return 32 if self.spread == 1 else 64 if self.spread <= 4 else 128

    @property
    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of everything that the kernels write within a step."""
        parts, width = (self.rows, self.slots // ROWS, self.summed), 1 << (self.head_dim - 1).bit_length()
        return {
            "candidates": ((self.rows, self.chunks, CHUNK), torch.int32),
            "counts": ((self.rows, self.bins, self.chunks), torch.uint16),
            "parts": ((*parts, width), torch.float32),
            "stats": ((*parts, 2), torch.float32),
        }

    @property
    def workspace(self) -> int:
        """Bytes of a workspace that holds the buffers."""
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in self.buffers.values())

    def carve(self, workspace: Tensor) -> dict[str, Tensor]:
        """The buffers as parts of a workspace, uint8."""
        found, at = {}, 0
        for name, (shape, dtype) in self.buffers.items():
            nbytes = math.prod(shape) * dtype.itemsize
            found[name] = workspace[at : at + nbytes].view(dtype).view(shape)
            at += _aligned(nbytes)
        return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
