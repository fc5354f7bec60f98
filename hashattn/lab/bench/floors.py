"""What a decode step cannot be faster than: the bytes that it reads, the bits that it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hashattn.lab.bench.cases import DTYPES, Case

POPCOUNTS = 16  # of 32 bits, per multiprocessor and clock
NORM = 2  # bytes


@dataclass(frozen=True)
class Machine:
    """A GPU's measured read bandwidth in bytes a second, its multiprocessors, and their clock in Hz, if it is known."""

    read: float
    processors: int
    clock: float | None

    def described(self) -> dict[str, Any]:
        """For a results file."""
        clock = self.clock and self.clock / 1e6
        return {"read_GB_per_s": self.read / 1e9, "sm_clock_MHz": clock, "multiprocessors": self.processors}

    def remarks(self) -> dict[str, None]:
        """What a results file must say besides."""
        return {} if self.clock else {"no popcount floor: the clock is not known": None}


@dataclass(frozen=True)
class Reads:
    """What a step chose and read, besides all codes. What the heads of a group have in common is read once.

    Attributes:
        kept: keys of a choice.
        keys, values, norms: rows of all sequences and KV heads; norms are those of keys whose logits are estimated.
    """

    kept: float
    keys: float
    values: float
    norms: float = 0.0


def code_bytes(case: Case, bits: int) -> int:
    """Of all codes, which every step reads."""
    return case.batch * case.kv_heads * case.keys * bits // 8


def step_bytes(case: Case, bits: int, reads: Reads) -> float:
    """Read by a step: all codes, and what it chose."""
    row = case.head_dim * DTYPES[case.dtype].itemsize
    return code_bytes(case, bits) + (reads.keys + reads.values) * row + reads.norms * NORM


def popcounts(case: Case, bits: int, per: str, planes: int = 1) -> int:
    """Population counts of 32 bits that a step needs.

    A key's distance, summed over the planes of a query, and over a group's queries where these choose together, is a
    weighted sum of its bits, up to a constant: one count for each binary digit of the weights.
    """
    summed = case.q_heads // case.kv_heads if per == "kv_head" else 1
    weight = summed * (2**planes - 1)  # of a bit that all planes of all queries agree on
    counts = weight % 2 + (weight // 2).bit_length()  # as in ops/decode/cuda/step.cuh
    return case.batch * case.q_heads // summed * case.keys * (bits // 32) * counts


def floors(case: Case, bits: int, per: str, machine: Machine, reads: Reads, planes: int = 1) -> dict[str, float | None]:
    """Microseconds: of the bytes, of the popcounts (None without a clock), and the larger of them."""
    read = step_bytes(case, bits, reads) / machine.read * 1e6
    count = None
    if machine.clock is not None:
        count = popcounts(case, bits, per, planes) / (POPCOUNTS * machine.processors * machine.clock) * 1e6
    found = {"byte_floor_us": read, "popcount_floor_us": count, "floor_us": max(read, count or 0.0)}
    return found | {"dense_floor_us": case.dense_bytes / machine.read * 1e6}
