"""Hamming distances with numpy's vectorised popcount, over the tensors' own memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 18  # words of scratch at a time: stays in the second-level cache


def distances(query: Tensor, codes: Tensor) -> Tensor:
    """The same result as :func:`reference.distances`, for tensors on the CPU."""
    planes = query.unsqueeze(-2) if query.ndim == 4 else query
    batch, q_heads, tokens, n_planes, n_words = planes.shape
    heads, keys = codes.shape[1:3]
    grouped = planes.reshape(batch, heads, -1, n_planes, n_words).numpy().view(np.uint64)
    rows = grouped.shape[2]
    out = torch.empty(batch, heads, rows, keys, dtype=torch.int32)
    target, source = out.numpy(), codes.numpy().view(np.uint64)  # of signed integers numpy counts the magnitude's bits
    block = max(1, _BLOCK // max(1, rows * n_words))
    for b in range(batch):
        for h in range(heads):
            for first in range(0, keys, block):
                part = source[b, h, first : first + block]  # [n, W]
                sums = target[b, h, :, first : first + block]
                sums[...] = 0
                for j in range(n_planes):
                    different = np.bitwise_count(grouped[b, h, :, j, None, :] ^ part)  # uint8 [G*T, n, W]
                    for w in range(n_words):
                        sums += different[..., w].astype(np.int32) << j
    return out.view(batch, q_heads, tokens, keys)
