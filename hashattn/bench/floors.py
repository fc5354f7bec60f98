"""What a decode step cannot be faster than: the bytes that it reads, the bits that it counts."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.bench.cases import DTYPES, Case

POPCOUNTS = 16  # of 32 bits, per multiprocessor and clock


@dataclass(frozen=True)
class Machine:
    """A GPU's measured read bandwidth in bytes a second, its multiprocessors, and their clock in Hz, if it is known."""

    read: float
    processors: int
    clock: float | None


def code_bytes(case: Case, bits: int) -> int:
    """Of all codes, which every step reads."""
    return case.batch * case.kv_heads * case.keys * bits // 8


def step_bytes(case: Case, bits: int, per: str) -> int:
    """Read by a step: all codes, and k keys and values for each head that chooses."""
    choosers = case.kv_heads if per == "kv_head" else case.q_heads
    row = case.head_dim * DTYPES[case.dtype].itemsize
    return code_bytes(case, bits) + case.batch * choosers * 2 * case.k * row


def floors(case: Case, bits: int, per: str, machine: Machine) -> dict[str, float | None]:
    """Microseconds: of the bytes, of the popcounts (None without a clock), and the larger of them."""
    read = step_bytes(case, bits, per) / machine.read * 1e6
    count = None
    if machine.clock is not None:
        popcounts = 2 * case.batch * case.q_heads * case.keys * (bits // 64)  # of 32 bits, with one bit plane
        count = popcounts / (POPCOUNTS * machine.processors * machine.clock) * 1e6
    return {
        "byte_floor_us": read, "popcount_floor_us": count, "floor_us": max(read, count or 0.0),
        "dense_floor_us": case.dense_bytes / machine.read * 1e6,
    }  # fmt: skip
