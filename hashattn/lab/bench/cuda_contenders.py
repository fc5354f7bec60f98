"""What a decode step on a GPU is compared with: dense attention, and other ways to select keys."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hashattn.lab.bench.cuda_inputs import GpuLayer
from hashattn.ops.dense import attend_all
from hashattn.ops.hamming.reference import distances

BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q [B, Hq, 1, D], keys and values [B, Hkv, N, D]


def dense() -> dict[str, Dense]:
    """The dense contenders by name. Each may raise where it does not serve a shape."""
    calls: dict[str, Dense] = {name: _sdpa(backend) for name, backend in BACKENDS.items()}
    return calls | {"Triton": lambda q, keys, values: attend_all(q, keys, values, q.shape[3] ** -0.5)}


def _sdpa(backend: SDPBackend) -> Dense:
    def call(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend does not serve: it also raises
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return call


def row_distances(layer: GpuLayer, shared: bool) -> Tensor:
    """int32 [rows, keys]: what a step with the signs of the layer's first query selects by."""
    rows = []
    for b in range(len(layer.codes)):
        found = distances(layer.query[0][b : b + 1, :, :, -1], layer.codes[b : b + 1])
        if shared:
            found = found.unflatten(1, (layer.codes.shape[1], -1)).sum(2, dtype=torch.int32)
        rows.append(found.flatten(0, 2))
    return torch.cat(rows)
