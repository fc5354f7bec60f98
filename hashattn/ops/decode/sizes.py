"""Sizes: how a fused step's kernels divide their work, and the memory that they write within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.ops.decode.rule import Rule

CHUNK = 2048  # keys of a program of the first kernel
ROWS = 64  # keys of a program of the second
SPLIT = 2048  # words of codes that a program of the first kernel of local.py compares, of one chunk
LEVELS = 32  # of candidates, as in cuda/step.cuh
_ALIGNED = 256  # bytes

Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


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
    words: int
    rule: Rule

    @classmethod
    def of(cls, q: Tensor, query: Tensor, keys: Tensor, codes: Tensor, rule: Rule) -> Sizes:
        """The sizes of a step on these tensors."""
        batch, q_heads, tokens, dim = q.shape
        rooms = keys.shape[2], codes.shape[2]
        return cls(batch, q_heads, keys.shape[1], tokens, dim, *rooms, *query.shape[3:], rule)

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
        """Columns of ids: the most keys that a choice keeps, rounded up unless every chunk has its own."""
        slots = self.rule.slots(self.room)
        return slots if self.rule.chunks is not None else -(-max(1, slots) // ROWS) * ROWS

    @property
    def splits(self) -> int:
        """Programs of the first kernel of local.py for each chunk."""
        return -(-self.code_room // (SPLIT // self.words * (self.rule.chunks or 1)))

    @property
    def state(self) -> tuple[int, int]:
        """Shape of what a step leaves for the next one, int32: hints, which may be anything, and zeros."""
        return self.hints + 1 + LEVELS, self.rows

    @property
    def hints(self) -> int:
        """Numbers that say how far a row's candidates are looked for."""
        return self.rule.chunks or 1

    @property
    def spread(self) -> int:
        """The largest share of one bit in a distance."""
        return self.summed * (2**self.planes - 1)

    @property
    def bins(self) -> int:
        """Distances below the bound that are told apart."""
        return 32 if self.spread == 1 else 64 if self.spread <= 4 else 128

    @property
    def triton(self) -> Buffers:
        """Shape and type of everything that the Triton kernels write within a step."""
        width = 1 << (self.head_dim - 1).bit_length()
        parts = self.rows, -(-self.slots // ROWS), self.summed
        joint: Buffers = {"parts": ((*parts, width), torch.float32), "stats": ((*parts, 2), torch.float32)}
        if self.rule.chunks is not None:
            entries = self.rows, self.rule.chunks, self.splits, self.rule.per_chunk
            return {"entries": (entries, torch.int32), **joint}
        return {
            "candidates": ((self.rows, self.chunks, CHUNK), torch.int32),
            "counts": ((self.rows, self.bins, self.chunks), torch.uint16), **joint,
        }  # fmt: skip

    @property
    def cuda(self) -> Buffers:
        """The same for the kernels in CUDA C++."""
        width = -(-self.head_dim // 64) * 64
        if self.rule.chunks is not None:
            parts = self.rows, self.rule.chunks
            return {"parts": ((*parts, width), torch.float32), "stats": ((*parts, 2), torch.float32)}
        parts = self.rows, self.slots // ROWS, self.summed
        return {
            "lists": ((self.rows, self.cuda_chunks, self.cuda_chunk), torch.uint16),
            "counts": ((self.rows, LEVELS, self.cuda_chunks), torch.uint16),
            "parts": ((*parts, width), torch.float32), "stats": ((*parts, 2), torch.float32),
        }  # fmt: skip

    @property
    def cuda_chunk(self) -> int:
        """Keys of a program of the first kernel in CUDA C++."""
        return 1024 if self.words == 4 else 2048

    @property
    def cuda_chunks(self) -> int:
        """Such programs for each KV head's codes."""
        return -(-self.code_room // self.cuda_chunk)

    @property
    def workspace(self) -> int:
        """Bytes of a workspace that holds either's buffers."""
        return max(_nbytes(self.triton), _nbytes(self.cuda))


def carve(workspace: Tensor, buffers: Buffers) -> dict[str, Tensor]:
    """The buffers as parts of a workspace, uint8."""
    found, at = {}, 0
    for name, (shape, dtype) in buffers.items():
        nbytes = math.prod(shape) * dtype.itemsize
        found[name] = workspace[at : at + nbytes].view(dtype).view(shape)
        at += _aligned(nbytes)
    return found


def _nbytes(buffers: Buffers) -> int:
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in buffers.values())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
