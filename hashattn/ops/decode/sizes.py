"""Sizes: how a fused step's kernels divide their work, and the memory that they write within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.rule import Rule

CHUNK = 2048  # keys of a program of the first kernel
ROWS = 64  # keys of a program of the second
SPLIT = 2048  # words of codes that a program of the first kernel of triton/local.py compares, of one chunk
LEVELS = 32  # of candidates, as in cuda/step.cuh
SHARERS = 16  # programs of a row that count its keys together, as in cuda/attend.cu
MOST_SPLITS = 128  # of a chunk, that the second kernel of triton/local.py merges
MOST_COLUMNS = 1 << 28  # that kernels count in 32 bits, with words of their codes and what is added to them
MOST_PROGRAMS = 65_535  # in the second and the third dimension of a grid
_ALIGNED = 256  # bytes

Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]
Widths = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of a step, from the shapes of what it is given: see :func:`hashattn.ops.decode.reference.decode`.

    Attributes:
        rule: in numbers no larger than the room.
        widths: of the hidden layers of the queries' and the keys' map, if the workspace serves them as well.
    """

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
    widths: Widths = ((), ())

    def __post_init__(self) -> None:
        """Raise ValueError for more than the kernels count, and for more columns than so few chunks serve."""
        object.__setattr__(self, "rule", self.rule.within(self.code_room))
        room = max(self.room, self.code_room)
        reasons = too_many(self.batch, self.q_heads, self.tokens, room, self.words, self.rule)
        if reasons:
            raise ValueError("; ".join(reasons))

    @classmethod
    def of(cls, x: Inputs) -> Sizes:
        """The sizes of a step on these tensors."""
        (batch, q_heads, tokens, dim), (planes, words) = x.q.shape, x.query.shape[3:]
        kv_heads, room, code_room = x.stored.keys.shape[1], x.stored.keys.shape[2], x.stored.codes.shape[2]
        return cls(batch, q_heads, kv_heads, tokens, dim, room, code_room, planes, words, x.rule)

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
    def lanes(self) -> int:
        """Rows of a KV head that a program of the scan serves."""
        return max(n for n in (1, 2, 3, 4) if self.group // self.summed % n == 0)

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
        """Programs of the first kernel of triton/local.py for each chunk."""
        return splits(self.code_room, self.words, self.rule)

    @property
    def state(self) -> tuple[int, int]:
        """Shape of what a step leaves for the next one, int32: hints, which may be anything, and zeros."""
        marks = -(-2 * (self.batch * self.tokens * self.code_room + 1) // self.rows)  # int64, from an even place on
        return self.hints + 2 + LEVELS + (LEVELS + marks if self.rule.calibrated else 0), self.rows

    @property
    def hints(self) -> int:
        """Numbers that say how far a row's candidates are looked for."""
        return self.rule.chunks or 1

    @property
    def farthest(self) -> int:
        """No distance, or sum of a KV head's, is larger."""
        return (64 * self.words + 255 * self.rule.biased) * self.spread

    @property
    def reach(self) -> int:
        """So much nearer does a calibration bring a choice's distance at most."""
        return self.summed * sum(max(0, discount) for discount in self.rule.discounts)

    @property
    def span(self) -> int:
        """No calibrated distances of a key differ by more."""
        return self.summed * sum(map(abs, self.rule.discounts))

    @property
    def spread(self) -> int:
        """The largest share of one bit in a distance."""
        return self.summed * (2**self.planes - 1)

    @property
    def unit(self) -> int:
        """Distances of a key, and what is subtracted from them, differ by multiples of it."""
        return 2 - self.spread % 2

    @property
    def margin(self) -> int:
        """How much farther than the last threshold keys are listed; so are those that a calibration may bring nearer.

        With more, fewer hints miss, and more keys are listed than are chosen. In a model that costs more than it saves.
        """
        return 2 * math.isqrt(self.spread) + self.reach

    @property
    def bins(self) -> int:
        """Distances below the bound that are told apart."""
        return bins(self.spread, self.span)

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
            "counts": ((self.rows, self.bins, self.chunks), torch.uint16),
            **({"marks": ((self.batch, self.tokens, self.code_room), torch.int64)} if self.rule.calibrated else {}),
            **joint,
        }

    @property
    def cuda(self) -> Buffers:
        """The same for the kernels in CUDA C++."""
        width = -(-self.head_dim // 64) * 64
        if self.rule.chunks is not None:
            heads = self.rows, self.rule.chunks
            return {"parts": ((*heads, width), torch.float32), "stats": ((*heads, 2), torch.float32)}
        parts = self.rows, self.slots // ROWS, self.summed
        return {
            "lists": ((self.rows, self.cuda_chunks, self.cuda_chunk), torch.uint16),
            "counts": ((self.rows, LEVELS, self.count_stride), torch.uint16),
            "parts": ((*parts, width), torch.float32),
            "stats": ((*parts, 2), torch.float32),
            "histograms": ((*parts[:1], min(SHARERS, parts[1]), self.places), torch.int32),
            **(self._calibrated if self.rule.calibrated else {}),
        }

    @property
    def _calibrated(self) -> Buffers:
        return {
            "nearer": ((self.batch, self.tokens, self.code_room), torch.int8),
            "new_counts": ((self.rows, LEVELS, self.count_stride), torch.uint16),
        }

    @property
    def places(self) -> int:
        """Of a histogram of all keys: one for each distance that there may be."""
        return (self.farthest + self.span) // self.unit + 2

    @property
    def cuda_chunk(self) -> int:
        """Keys of a program of the first kernel in CUDA C++."""
        return 1024 if self.words == 4 else 2048

    @property
    def cuda_chunks(self) -> int:
        """Such programs for each KV head's codes."""
        return -(-self.code_room // self.cuda_chunk)

    @property
    def count_stride(self) -> int:
        """The same, up to a multiple of four, which are read at a time."""
        return -(-self.cuda_chunks // 4) * 4

    @property
    def workspace(self) -> int:
        """Bytes of a workspace that holds any one's buffers."""
        tokens = self.batch * self.tokens
        encoding = Encoding((tokens * self.q_heads, tokens * self.kv_heads), self.widths, 64 * self.words)
        return max(map(nbytes, (self.triton, self.cuda, layer_parts(encoding.counts, self.widths), encoding.parts)))


def bins(spread: int, span: int) -> int:
    """Distances below the bound that are told apart, where calibrated ones of a key differ by up to `span`."""
    least = 32 if spread == 1 else 64 if spread <= 4 else 128
    return int(max(least, 1 << (least // 2 + span - 1).bit_length()))


def splits(columns: int, words: int, rule: Rule) -> int:
    """Programs of the first kernel of triton/local.py for each chunk."""
    return -(-columns // (SPLIT // words * (rule.chunks or 1)))


def too_many(batch: int, q_heads: int, tokens: int, room: int, words: int, rule: Rule) -> list[str]:
    """What of a step is more than the kernels count, and what would be served: every reason."""
    reasons = []
    if room > MOST_COLUMNS:
        reasons.append(
            f"the cache has room for {room:,} columns, the kernels count up to {MOST_COLUMNS:,}: "
            'engine="reference" serves them'
        )
    for what, queries in (("sequences", batch), ("query heads", q_heads)):
        if queries * tokens > MOST_PROGRAMS:
            reasons.append(
                f"{queries:,} {what} of {tokens} queries are more than the {MOST_PROGRAMS:,} that the kernels serve at "
                "a time: take fewer"
            )
    if rule.chunks is not None and words <= SPLIT and splits(room, words, rule) > MOST_SPLITS:
        most = MOST_SPLITS * (SPLIT // words) * rule.chunks
        reasons.append(
            f"the cache has room for {room:,} columns, {rule.chunks} chunks serve up to {most:,} of them: take a "
            "larger k or a smaller per_chunk"
        )
    return reasons


@dataclass(frozen=True)
class Encoding:
    """How cuda/encode.cu divides its work.

    Attributes:
        counts: queries, and new keys.
        widths: of the hidden layers of the queries' and the keys' map.
    """

    counts: tuple[int, int]
    widths: Widths
    bits: int

    @property
    def units(self) -> int:
        """Units of the first hidden layer that a program takes."""
        return 64 if self.counts[0] > 64 or max(sum(own[:1]) for own in self.widths) > 256 else 32

    @property
    def groups(self) -> tuple[int, int]:
        """Of queries, and of keys."""
        queries, keys = (-(-count // together(self.counts[0])) for count in self.counts)
        return queries, keys

    @property
    def slices(self) -> tuple[int, int]:
        """Of the first hidden layer of the queries' and the keys' map."""
        queries, keys = (-(-sum(own[:1]) // self.units) for own in self.widths)
        return queries, keys

    @property
    def programs(self) -> tuple[int, int]:
        """Of queries, and of keys: one of each group for the linear map, and one for each slice."""
        queries, keys = (groups * (slices + 1) for groups, slices in zip(self.groups, self.slices, strict=True))
        return queries, keys

    @property
    def parts(self) -> Buffers:
        """Shape and type of what programs write for the last one: parts of the second layer, and the linear map's."""
        buffers: Buffers = {}
        for name, count, slices, layers in zip(("query", "key"), self.counts, self.slices, self.widths, strict=True):
            if layers:
                buffers[f"{name}_parts"] = (slices, count, (*layers, self.bits)[1]), torch.float32
                buffers[f"{name}_straight"] = (count, self.bits), torch.float32
        return buffers


def together(queries: int) -> int:
    """Queries or keys of a group in cuda/encode.cu: few, so that every multiprocessor has a program."""
    return 2 if queries <= 32 else 4 if queries <= 64 else 8


def counters(queries: int, keys: int) -> int:
    """Numbers by which programs that encode find out that they are the last, zero between launches."""
    return 1 + sum(-(-count // together(queries)) for count in (queries, keys))


def layer_parts(counts: tuple[int, int], widths: Widths) -> Buffers:
    """Shape and type of what triton/mlp.py writes: parts of the last hidden layer, of queries and of new keys."""
    buffers: Buffers = {}
    for name, count, layers in zip(("query", "key"), counts, widths, strict=True):
        if layers:
            parts = -(-layers[0] // blocking(count)[1]) if len(layers) > 1 else 1
            buffers[name] = (parts, count, layers[-1]), torch.float32
    return buffers


def blocking(count: int) -> tuple[int, int, int]:
    """Vectors and hidden units of a program of triton/mlp.py, and its warps: many small programs for a few vectors."""
    if count <= 64:
        return 4, 16, 4
    return (16, 16, 4) if count <= 512 else (8, 64, 8)


def grid(programs: int, rows: int, batch: int) -> tuple[int, int, int]:
    """Of a Triton kernel: so many programs for each row of each sequence; only the first dimension may be large."""
    return programs, rows // batch, batch


def carve(workspace: Tensor, buffers: Buffers) -> dict[str, Tensor]:
    """The buffers as parts of a workspace, uint8."""
    found = {}
    for name, at in places(0, buffers).items():
        shape, dtype = buffers[name]
        found[name] = workspace[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
    return found


def places(first: int, buffers: Buffers) -> dict[str, int]:
    """Where they begin in a workspace that begins at `first`, in bytes."""
    found, at = {}, first
    for name, (shape, dtype) in buffers.items():
        found[name] = at
        at += _aligned(math.prod(shape) * dtype.itemsize)
    return found


def nbytes(buffers: Buffers) -> int:
    """Bytes of a workspace that holds them."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in buffers.values())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
