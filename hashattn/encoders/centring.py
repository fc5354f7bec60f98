"""Centring: what is subtracted from the keys of a row before their signs are taken."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.core.checks import check_number, keep_ints


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
        object.__setattr__(self, "strength", check_number("strength", self.strength))
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1 (centring=None for none), got {self.strength!r}")
        keep_ints(self, keys=1, skip=0)

    def centre(self, k: Tensor) -> Tensor:
        """Of a row's visible keys [..., N, D], warmup of them at least: float32 [..., D]."""
        return self.strength * k[..., self.skip : self.warmup, :].float().mean(-2)

    @property
    def warmup(self) -> int:
        """Visible keys that a row needs before its centre is frozen."""
        return self.skip + self.keys


def check_centring(centring: Centring | None) -> Centring | None:
    """What an encoder was given as its centring; raises TypeError if it is neither a Centring nor None."""
    if centring is not None and not isinstance(centring, Centring):
        raise TypeError(f"centring must be a Centring, or None for none, got {centring!r}")
    return centring
