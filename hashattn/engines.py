"""Which engine serves a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashattn.attention import HashAttention

# Keys from which dashkv, the slowest preset, is faster than dense attention: benchmarks/results/decode_step_*.json.
CROSSOVER = {"cpu": 4096, "cuda": 65536}


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
    if visible < CROSSOVER.get(device, CROSSOVER["cuda"]):
        return "dense"
    return "cpu" if device == "cpu" else "reference"
