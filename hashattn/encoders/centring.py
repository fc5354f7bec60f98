"""Centring: what is subtracted from the keys of a row before their signs are taken."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.core.checks import keep_ints


@dataclass(frozen=True)
class Centring:
    """A share of the mean of a row's first visible keys, frozen per row, layer and KV head.

    Keys share a large mean, which softmax ignores and signs do not. Post-RoPE it drifts with the position, so that the
    mean of the first keys, subtracted in full, is worse on late ones than none at all; half of it is better than
    either (benchmarks/results/centring.json).

    Args:
        strength: share of the mean that is subtracted, above 0 and at most 1.
        keys: how many keys are averaged. Queries that see fewer than skip + keys attend densely.
        skip: how many first keys are left out: attention sinks are unlike the others.
    """

    strength: float = 0.5
    keys: int = 256
    skip: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1 (centring=None for none), got {self.strength!r}")
        keep_ints(self, keys=1, skip=0)

    @property
    def warmup(self) -> int:
        """Visible keys that a row needs before its centre is frozen."""
        return self.skip + self.keys

    def centre_of(self, keys: Tensor) -> Tensor:
        """What is subtracted, float32 [..., D], of a row's visible keys [..., N, D], as many as `warmup` or more."""
        return self.strength * keys[..., self.skip : self.warmup, :].float().mean(-2)
