"""Small random queries, keys and values, full attention in float64, and what rounding may cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.attention import HashAttention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """Of what a check runs on. G = q_heads / kv_heads.

    Args:
        q_heads, kv_heads, head_dim: Hq, Hkv, D; a fitted part dictates them.
        start: columns of left padding of the second row.
        device: of all tensors.
    """

    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    start: int = 11
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Inputs:
    """Two rows: queries [2, Hq, T, D], keys and values [2, Hkv, N, D], start int64 [2]."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def rounding(self) -> float:
        """A bound on the rounding of attention: of logits, sums of D products; of N weights; of values and output."""
        eps, keys, dim = torch.finfo(torch.float32).eps, self.k.shape[2], self.q.shape[3]
        q, k = (x.double().norm(dim=-1).max().item() for x in (self.q, self.k))
        relative = 2 * dim * eps * q * k * self.scale + keys * eps + 4 * torch.finfo(self.q.dtype).eps
        return relative * self.v.abs().max().item()


def inputs(
    shape: Shape,
    attn: HashAttention | None = None,
    *,
    tokens: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Gaussian inputs with enough keys for the centre of a composition's rows."""
    centring = attn.encoder.centring if attn is not None and attn.encoder is not None else None
    keys = 90 + shape.start + (centring.warmup if centring is not None else 0)
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, shape.q_heads, tokens, shape.head_dim, generator=g)
    k, v = torch.randn(2, 2, shape.kv_heads, keys, shape.head_dim, generator=g)
    q, k, v = (x.to(shape.device, dtype) for x in (q, k, v))
    return Inputs(q, k, v, torch.tensor([0, shape.start]))


def visible(data: Inputs) -> Tensor:
    """What each query sees, the last T columns being the queries' own: bool [2, 1, T, N]."""
    tokens, keys = data.q.shape[2], data.k.shape[2]
    column = torch.arange(keys)
    end = torch.arange(keys - tokens, keys)[:, None]
    return ((column >= data.start[:, None, None]) & (column <= end)).unsqueeze(1).to(data.q.device)


def logits64(data: Inputs) -> Tensor:
    """float64 [2, Hq, T, N]."""
    k = data.k.double().repeat_interleave(data.q.shape[1] // data.k.shape[1], 1)
    return data.q.double() @ k.transpose(-1, -2) * data.scale


def attention64(data: Inputs, keep: Tensor) -> Tensor:
    """Attention to the keys in keep, bool [2, 1 or Hq, T, N], in float64; zeros where a query keeps none."""
    weights = logits64(data).masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num()
    return weights @ data.v.double().repeat_interleave(data.q.shape[1] // data.k.shape[1], 1)
