"""One decode step fused: scan, exact top-k and attention in two kernels on a GPU."""

from __future__ import annotations

import importlib.util

import torch

from hashattn.ops.decode.device import why_not_nvidia
from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.maps import why_not as why_not_encode
from hashattn.ops.decode.reference import decode as reference
from hashattn.ops.decode.reference import decode_tiers as reference_tiers
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.scratch import Scratch
from hashattn.ops.decode.sizes import MOST_PROGRAMS, Sizes

__all__ = [
    "Estimate", "Map", "Rule", "Scratch", "Sizes", "reference", "reference_tiers", "why_not",
    "why_not_encode", "why_not_nvidia",
]  # fmt: skip

DEVICES = ("cuda",)
HEAD_DIMS = (64, 96, 128, 256)
MOST_LEVELS = 4096  # distances that are told apart
MOST_TOKENS = 16
PER_CHUNK = (8, 16, 32, 64)
MOST_SLOTS = 1 << 24  # of the chunks of LocalTopK, each of which has its own


def why_not(
    *, device: str, dtype: torch.dtype, head_dim: int, group: int, tokens: int, words: int, planes: int, rule: Rule,
    batch: int = 1,
) -> str | None:  # fmt: skip
    """Why the fused step does not serve a call, and what would; None if it does.

    Args:
        device: kind of device.
        group: query heads of a KV head.
        tokens: queries of a row.
        words: int64 words of a code.
        planes: bit planes of a query.
        batch: sequences.
    """
    if device not in DEVICES:
        return f"its kernels need an NVIDIA GPU, the tensors are on {device}"
    if why_not_nvidia() is not None:
        return why_not_nvidia()
    if importlib.util.find_spec("triton") is None:
        return 'it needs Triton: pip install "hashattn[gpu]"'
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it serves bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"it serves head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if not 1 <= group <= 16:
        return f"it serves 1 to 16 query heads a KV head, not {group}"
    if tokens > MOST_TOKENS:
        return f"it serves up to {MOST_TOKENS} queries at a time, not {tokens}"
    if batch * tokens > MOST_PROGRAMS:
        return f"it serves up to {MOST_PROGRAMS:,} queries of all sequences at a time, not {batch * tokens:,}"
    if words not in (1, 2, 4):
        return f"it serves codes of 64, 128 or 256 bits, not {64 * words}"
    if rule.chunks is not None:
        if rule.shared:
            return "LocalTopK makes one choice per query head there, not one for a KV head"
        if rule.per_chunk not in PER_CHUNK:
            return f"it serves LocalTopK with per_chunk {', '.join(map(str, PER_CHUNK))}, not {rule.per_chunk}"
        if rule.chunks * rule.per_chunk > MOST_SLOTS:
            return f"it serves LocalTopK with k up to {MOST_SLOTS:,}, not {rule.chunks * rule.per_chunk:,}"
        if rule.most_forced > rule.per_chunk:
            return f"up to {rule.most_forced} sinks and recents fall into one chunk of LocalTopK: take a larger k"
    spread = (group if rule.shared else 1) * (2**planes - 1)
    farthest = (64 * words + 255 * rule.biased) * spread
    if planes > 2 or farthest + 4 > MOST_LEVELS:
        return f"distances up to {farthest:,} are more than it tells apart: take fewer bits or query_bits"
    return None
