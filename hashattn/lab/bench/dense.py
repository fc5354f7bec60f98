"""Dense attention of one token, the honest ways: what a search has to beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# SDPA's own GQA is left out: at one query a head it is 1.5 to 12 times slower on CPUs than either of these.


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA with the heads of a group as its queries: q [B, Hq, 1, D], k and v [B, Hkv, N, D]."""
    return F.scaled_dot_product_attention(q.view(k.shape[0], k.shape[1], -1, k.shape[3]), k, v).view(q.shape)


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products and a softmax; in bfloat16 the logits are rounded to it."""
    grouped = q.view(k.shape[0], k.shape[1], -1, k.shape[3])
    return (torch.softmax(grouped @ k.transpose(-1, -2) * k.shape[3] ** -0.5, -1) @ v).view(q.shape)


DENSE = {"grouped SDPA": grouped_sdpa, "grouped matmul": grouped_matmul}
