"""A decode step on a GPU, and its encoding, in CUDA C++ where that can be compiled and in Triton where it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.rule import Rule

OLDEST = (8, 0)  # compute capability


def why_triton(device: torch.device | None = None) -> str | None:
    """Why steps run in Triton, as the end of a sentence; None if they run in CUDA C++, which is faster.

    Args:
        device: None for any GPU.
    """
    if device is not None and torch.cuda.get_device_capability(device) < OLDEST:
        return "CUDA C++ is written for compute capability 8.0 and above"
    reason = compiler.why_not()
    if reason is None and device is not None and torch.cuda.is_available():  # else there is none to be tried
        return compiler.why_not_on(torch.cuda.current_device() if device.index is None else device.index)
    return reason


def kernels(device: torch.device | None = None) -> str:
    """What the kernels of a step are written in. Those that estimate logits of medium keys are always in Triton."""
    return "CUDA C++" if why_triton(device) is None else "Triton"


def decode(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, rule: Rule, workspace: Tensor, *, scale: float, causal: bool = True, scan_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hashattn.ops.decode.triton.decode`."""
    if why_triton(q.device) is None:
        from hashattn.ops.decode.cuda.step import decode as fused
    else:
        from hashattn.ops.decode.triton import decode as fused  # Triton is imported where it is needed
    return fused(
        q, query, keys, values, codes, starts, length, bounds, rule, workspace, scale=scale, causal=causal,
        scan_only=scan_only,
    )  # fmt: skip


def encode(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, maps: tuple[Map, Map], query_bits: int, keys: Tensor,
    values: Tensor, codes: Tensor, length: Tensor, arrived: Tensor, workspace: Tensor, norms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See :func:`hashattn.ops.decode.encode.encode`."""
    if why_triton(q.device) is None:
        from hashattn.ops.decode.cuda import encode as language
    else:
        from hashattn.ops.decode import encode as language  # type: ignore[no-redef]
    held = keys, values, codes, length, arrived, workspace, norms
    return language.encode(q, k, v, centre, maps, query_bits, *held)
