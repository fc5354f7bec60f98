"""A decode step on a CPU in loops that Numba compiles, for binary codes: what it serves, and steps of it."""

from __future__ import annotations

import functools
import importlib.util

import torch

from hashattn.ops.compiled.places import MOST_LAYERS
from hashattn.ops.decode import KernelRequest

__all__ = ["MOST_LAYERS", "why_not", "why_not_here"]

DTYPES = (torch.float32, torch.bfloat16)
FARTHEST = 60_000  # distances are summed in 16 bits
DISCOUNTS, VOTERS = 100, 255


def why_not(request: KernelRequest) -> list[str]:
    """Why the compiled loops do not serve a step, as ends of sentences: every reason, [] if they do."""
    if request.device.type != "cpu":
        return [f"its loops need tensors on the CPU, got {request.device.type}"]
    rule, reasons = request.rule, [*why_not_here()]
    if request.scores != "hamming":
        reasons.append("they serve binary codes in a FlatHamming index")
    if request.dtype not in DTYPES:
        reasons.append(f"they serve float32 and bfloat16, not {str(request.dtype).removeprefix('torch.')}")
    if rule.chunks is not None:
        reasons.append("they choose of all keys, not of each chunk as LocalTopK does")
    reasons += _why_not_calibrated(request)
    spread = (request.group if rule.shared else 1) * (2**request.planes - 1)
    farthest = (64 * request.words + 255 * rule.biased) * spread
    if farthest > FARTHEST:
        reasons.append(f"they tell distances up to {FARTHEST:,} apart, not {farthest:,}: take fewer bits or query_bits")
    return reasons


def _why_not_calibrated(request: KernelRequest) -> list[str]:
    """Distances are bytes above a base, of which discounts may take a part; so are votes."""
    rule, group = request.rule, request.group if request.rule.shared else 1
    discounts = group * (abs(rule.vote_discount) + abs(rule.prior_discount))
    reasons = []
    if discounts > DISCOUNTS:
        reasons.append(f"they serve discounts of Consensus and Momentum up to {DISCOUNTS} together, not {discounts}")
    if rule.calibrated and request.q_heads // group > VOTERS:
        reasons.append(f"they count the votes of up to {VOTERS} choices, not {request.q_heads // group}")
    return reasons


@functools.cache
def why_not_here() -> tuple[str, ...]:
    """Why they do not run in this environment."""
    if importlib.util.find_spec("numba") is None:
        return ('they need Numba: pip install "hashattn[cpu]"',)
    try:
        from hashattn.ops.compiled import loops  # noqa: F401 (which imports Numba)
    except Exception as error:  # an installation that is too old, or does not go with this NumPy
        return (f"Numba cannot be used here: {type(error).__name__}: {error}".split("\n")[0],)
    return ()
