"""Map: what vectors are multiplied by before the signs are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_HIDDEN = 2  # hidden layers
WIDEST = 512


@dataclass(frozen=True)
class Map:
    """x @ linear, plus the output of an MLP with ReLU if it has layers, with the same weights for all heads.

    Attributes:
        linear: float32 [D, bits], contiguous.
        weights, biases: of the MLP's layers, float32 [fan_in, fan_out] and [fan_out], contiguous; the last are
            [..., bits]. Empty where the map is linear.
        unit: whether x is scaled to unit mean square first.
    """

    linear: Tensor
    weights: tuple[Tensor, ...] = ()
    biases: tuple[Tensor, ...] = ()
    unit: bool = False

    @classmethod
    def of(cls, tensors: Sequence[Tensor], unit: bool = False) -> Map:
        """From what :attr:`tensors` gives."""
        return cls(tensors[0], tuple(tensors[1::2]), tuple(tensors[2::2]), unit)

    @property
    def tensors(self) -> list[Tensor]:
        """linear, then weights and bias of each layer."""
        return [self.linear, *(x for layer in zip(self.weights, self.biases, strict=True) for x in layer)]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the hidden layers."""
        return tuple(b.shape[0] for b in self.biases[:-1])

    def __call__(self, x: Tensor) -> Tensor:
        """Vectors [..., D] before the signs are taken, [..., bits], in plain PyTorch: what the kernels compute."""
        if self.unit:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True).clamp(min=1e-12))
        p = x @ self.linear
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (torch.relu(x) if i else x) @ weight + bias
        return p + x if self.weights else p


def why_not(widths: tuple[tuple[int, ...], tuple[int, ...]] | None) -> list[str]:
    """Why queries and keys are encoded in PyTorch and not in the step's own kernels: every reason, [] if they are not.

    Args:
        widths: of the hidden layers of the queries' and the keys' map; None for codes that do not come from such maps.
    """
    if widths is None:
        return ["its codes are not signs of maps that all heads share"]
    deepest, widest = max(map(len, widths)), max((0, *widths[0], *widths[1]))
    reasons = []
    if deepest > MOST_HIDDEN:
        reasons.append(f"its kernels serve up to {MOST_HIDDEN} hidden layers, not {deepest}")
    if widest > WIDEST:
        reasons.append(f"its kernels serve hidden layers up to {WIDEST} wide, not {widest}")
    return reasons
