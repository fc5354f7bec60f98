"""HashNet: the map whose signs are a learned code."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from hashattn.encoders.fitted import part_of_heads
from hashattn.ops.decode import Map


class HashNet(nn.Module):
    """A linear map plus an MLP that starts at zero, with one set of weights for `heads` heads each.

    Args:
        planes: float32 [D, bits], where the linear map starts.
        hidden: widths of the MLP's hidden layers; () for the linear map alone.
        heads: number of weight sets; 1 is shared by all heads.
        seed: of the MLP's initial weights.
    """

    def __init__(self, planes: Tensor, hidden: tuple[int, ...], heads: int, seed: int) -> None:
        super().__init__()
        self.skip = nn.Parameter(planes.repeat(heads, 1, 1))
        generator = torch.Generator().manual_seed(seed)
        widths = (planes.shape[0], *hidden, planes.shape[1])
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            if hidden:
                last = i == len(hidden)
                start = torch.randn(heads, fan_in, fan_out, generator=generator) * math.sqrt(2 / fan_in)
                start = torch.zeros_like(start) if last else start
                self.weights.append(nn.Parameter(start.to(planes.device)))
                self.biases.append(nn.Parameter(torch.zeros(heads, 1, fan_out, device=planes.device)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, H, N, bits]; head h takes weight set h * heads // H."""
        shape, one = x.shape, len(self.skip) == 1  # one set of weights is a plain matrix product, which starts quicker
        x = x.reshape(-1, shape[-1]) if one else x.reshape(shape[0], len(self.skip), -1, shape[-1])
        out = x @ (self.skip[0] if one else self.skip)  # [B, heads, H/heads * N, bits]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight[0] + bias[0] if one else x @ weight + bias
            x = torch.relu(x) if i < len(self.weights) - 1 else x
        if len(self.weights):
            out = out + x
        return out.view(*shape[:-1], -1)

    def for_heads(self, kv_heads: int, first: int, count: int, each: int) -> HashNet:
        """For some KV heads, of each of which there are `each` sets of weights."""
        part = part_of_heads(self, kv_heads, first, count, {"skip": each})
        rows = {str(i): each for i in range(len(self.weights))}
        part._modules = {
            name: part_of_heads(list_, kv_heads, first, count, rows)
            for name, list_ in (("weights", self.weights), ("biases", self.biases))
        }
        return part

    def as_map(self, unit: bool) -> Map:
        """Its one set of weights, and whether what it takes is scaled to unit mean square first."""
        weights, biases = (tuple(p[0].detach() for p in of) for of in (self.weights, self.biases))
        return Map(self.skip[0].detach(), weights, tuple(b[0] for b in biases), unit)

    def __repr__(self) -> str:
        heads, dim, bits = self.skip.shape
        widths = [int(w.shape[-1]) for w in self.weights[:-1]]
        return f"HashNet(dim={dim}, hidden={widths}, bits={bits}, heads={heads})"
