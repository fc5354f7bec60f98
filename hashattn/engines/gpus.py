"""GPUS: from how many keys on a fused step is worth it, as `hashattn bench crossover` measured it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hashattn.ops.decode import why_not_nvidia


@dataclass(frozen=True)
class Gpu:
    """One GPU's crossovers, in bytes of the keys and values that dense attention reads in a step of one layer.

    In bytes, because dense attention's time is that of its bytes, and the time of a short step is that of its launches.

    Attributes:
        capability: compute capability.
        eager: from where on a step launched from Python is clearly faster than dense attention, in every measured case.
        captured: the same in a CUDA graph.
        source: where the figures come from.
        families: both, for steps over the scores of other families, by their names; where one is missing, "auto"
            attends densely.
        calibrated: both, for steps with votes or a prior (Consensus, Momentum); None where they were not measured.
    """

    capability: tuple[int, int]
    eager: int
    captured: int
    source: str
    calibrated: tuple[int, int] | None = None
    families: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def keys(
        self, key_bytes: int, captured: bool = False, calibrated: bool = False, scores: str = "hamming"
    ) -> int | None:
        """Visible keys from which a step is faster; None if that was not measured.

        Args:
            key_bytes: of a key and its value, in all sequences and KV heads.
            calibrated: whether it calibrates its distances.
            scores: the family of its scores.
        """
        measured = self.calibrated if calibrated else (self.eager, self.captured)
        if scores != "hamming":
            measured = self.families.get(scores)
        return None if measured is None else math.ceil(measured[captured] / key_bytes)


GPUS: dict[str, Gpu] = {  # by torch.cuda.get_device_name()
    # Calibrated steps: captured, by bench_cuda_dashkv_h200.json; eager, twice that. Positions cost less than codes.
    "NVIDIA H200": Gpu(
        (9, 0),
        *(67_108_864, 100_663_296),
        source="crossover_h200.json",
        calibrated=(805_306_368, 402_653_184),
        families={"positions": (67_108_864, 100_663_296)},
    ),
}


def this_gpu(device: torch.device | None = None) -> tuple[str, Gpu] | None:
    """A GPU's entry and its name; else that of the same compute capability whose eager steps win last.

    Args:
        device: None for the current one.

    Returns:
        None for one that nothing is known of, and for one that is not NVIDIA's.
    """
    if not torch.cuda.is_available() or why_not_nvidia() is not None:
        return None
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if name in GPUS:
        return name, GPUS[name]
    alike = [(other, gpu) for other, gpu in GPUS.items() if gpu.capability == capability]
    return max(alike, key=lambda pair: pair[1].eager, default=None)
