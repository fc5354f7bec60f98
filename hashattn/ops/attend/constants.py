"""What the kernel that attends to given columns is compiled with."""

from __future__ import annotations

from typing import Any

import torch

from hashattn.ops.decode.device import capability, registers, starts_early

ROWS = 64  # keys of a program


def attend_constants(q_heads: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> dict[str, Any]:
    """What attend_ids is compiled with, for so many choices of a sequence."""
    summed = q_heads // heads
    padded, width = 1 << (summed - 1).bit_length(), 1 << (dim - 1).bit_length()
    early = {"launch_pdl": True} if starts_early(device) else {}
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "SUM": summed,
        "PADDED": padded if summed == 1 else max(16, padded),
        "PADDED_OUT": padded,
        "DIM": dim,
        "WIDTH": width,
        "ROWS": ROWS,
        "PDL": bool(early),
        "num_warps": 4 if width > 128 else 2,
        **registers(capability(device)),
        **early,
    }
