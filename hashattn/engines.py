"""Which engine serves a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashattn.attention import HashAttention

# Keys from which a step beats the fastest dense attention, where the query heads of a KV head share one choice:
# benchmarks/results/decode_step_cpu.json (hata). A choice per query head gathers G times as much and did not win at
# every length, nor does plain PyTorch on CUDA (decode_step_h200.json), so "auto" stays dense there.
SHARED_ON_CPU = 8192


def crossover(attn: HashAttention, device: str) -> int | None:
    """Visible keys from which engine="auto" searches on this kind of device; None if it never does."""
    return SHARED_ON_CPU if device == "cpu" and attn.selector is not None and attn.selector.shared else None


def resolve(attn: HashAttention, device: str, visible: int) -> str:
    """The engine for a step over `visible` keys on this kind of device: "dense", "reference" or "cpu".

    Raises:
        ValueError: engine="cpu" for tensors on another device.
    """
    if not attn.attend.needs_selection or attn.engine == "dense":
        return "dense"
    if attn.engine == "cpu" and device != "cpu":
        raise ValueError(f'engine="cpu" needs tensors on the CPU, got {device}; engine="reference" runs anywhere')
    if attn.engine != "auto":
        return attn.engine
    least = crossover(attn, device)
    return "dense" if least is None or visible < least else "cpu"
