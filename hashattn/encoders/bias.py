"""KeyBias: how much a key matters whatever the query, written into its code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hashattn.ops.decode import Map


class KeyBias(nn.Module):
    """A scalar for each key, from a small MLP, kept in the last bits of its code as a thermometer.

    Signs lose the norms of keys, and that some keys matter to every query. A bias of b, rounded and between 0 and
    `bits`, sets the first b of these bits; queries have all of them set, so that a key is b bits nearer than one
    without. Whatever scans Hamming distances thus serves it. It starts in the middle, the same for every key.

    Args:
        dim: head dimension.
        bits: of the code that the bias takes; its range.
        heads: number of weight sets; 1 is shared by all heads.
        seed: of the initial weights.
    """

    HIDDEN = 32

    def __init__(self, dim: int, bits: int, heads: int, seed: int) -> None:
        super().__init__()
        hidden = self.HIDDEN
        generator = torch.Generator().manual_seed(seed)
        self.bits = bits
        start = torch.randn(heads, dim, hidden, generator=generator) * math.sqrt(2 / dim)
        self.weight, self.bias = nn.Parameter(start), nn.Parameter(torch.zeros(heads, 1, hidden))
        self.out, self.middle = nn.Parameter(torch.zeros(heads, hidden, 1)), nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Centred keys [B, H, N, D] -> their bias around zero, in bits, float32 [B, H, N, 1], not rounded."""
        rows = x.reshape(x.shape[0], len(self.weight), -1, x.shape[-1])
        hidden = torch.relu(rows @ self.weight + self.bias)
        return (hidden @ self.out + self.middle).view(*x.shape[:-1], 1)

    def thermometer(self, x: Tensor) -> Tensor:
        """The last bits of the keys' projections, [B, H, N, bits]: not negative where the bit is set."""
        return self(x) - self.steps(x.device)

    def steps(self, device: torch.device) -> Tensor:
        """The bias from which on each bit is set, [bits]."""
        return torch.arange(self.bits, device=device) + (0.5 - self.bits / 2)

    def relaxed(self, x: Tensor, hard: bool) -> Tensor:
        """The bias within its range, [B, H, N, 1]; rounded with a straight-through gradient if hard."""
        half = self.bits / 2
        soft = self(x).clamp(-half, half)
        return soft + ((soft + half + 0.5).floor() - half - soft).detach() if hard else soft

    def rescale(self, factor: float) -> None:
        """Let keys that are larger by 1 / factor than was thought give the same bias."""
        with torch.no_grad():
            self.weight.mul_(factor)

    def append_to(self, linear: Map) -> Map:
        """A linear map of keys with the thermometer as its last bits, for kernels to multiply with."""
        planes = torch.nn.functional.pad(linear.linear, (0, self.bits))
        out = self.out[0].detach().expand(-1, self.bits)
        last = torch.nn.functional.pad(out, (planes.shape[1] - self.bits, 0)).contiguous()
        shift = self.middle[0, 0].detach() - self.steps(planes.device)
        return Map(
            planes,
            (self.weight[0].detach(), last),
            (self.bias[0, 0].detach(), torch.nn.functional.pad(shift, (planes.shape[1] - self.bits, 0))),
            linear.unit,
        )


def check_bias(bits: int, query_bits: int, bias_bits: int) -> None:
    """Raise ValueError unless so many bits of a code can hold a bias."""
    if not 0 <= bias_bits <= bits - 8:
        raise ValueError(f"bias_bits must be from 0 to bits - 8 = {bits - 8}, got {bias_bits!r}")
    if bias_bits and query_bits > 1:
        raise ValueError(f"bias_bits={bias_bits} needs query_bits=1: planes of a query have no bit that is worth one")
