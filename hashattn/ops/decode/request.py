"""KernelRequest: a kind of step, and what of it the kernels for binary codes serve, in whichever language."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hashattn.ops.decode.device import has_triton, why_not_nvidia
from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.sizes import bins, too_many

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 96, 128, 256)
_NO_TRITON = 'it needs Triton: pip install "hashattn[gpu]"'
MOST_LEVELS = 4096  # distances that are told apart
MOST_TOKENS = 16
PER_CHUNK = (8, 16, 32, 64)
MOST_BINS = 256  # below a bound
MOST_HEADS = 512  # whose votes and weights are counted together
MOST_SLOTS = 1 << 24  # of the chunks of LocalTopK, each of which has its own


@dataclass(frozen=True)
class KernelRequest:
    """A kind of step, of which there need not be any tensors yet.

    Attributes:
        device: where it runs; "cuda" without a number is any GPU.
        dtype: of queries, keys and values.
        scores: the family of scores that rank the keys, as an index says itself.
        words: int64 words of a code.
        planes: bit planes of a query.
        rule: which keys are kept; with a share of critical keys the logits of the others are estimated.
        tokens: queries of a row.
        room: columns of the cache, where they are known.
    """

    device: torch.device
    dtype: torch.dtype
    q_heads: int
    kv_heads: int
    head_dim: int
    words: int
    planes: int
    rule: Rule
    scores: str = "hamming"
    batch: int = 1
    tokens: int = 1
    room: int = 1

    @classmethod
    def of(cls, x: Inputs) -> KernelRequest:
        """Of a step on these tensors."""
        (batch, q_heads, tokens, head_dim), (planes, words) = x.q.shape, x.query.shape[3:]
        rule = x.rule if x.estimate is not None else replace(x.rule, critical=None)
        heads, room = (q_heads, x.stored.keys.shape[1]), max(x.stored.keys.shape[2], x.stored.codes.shape[2])
        return cls(x.q.device, x.q.dtype, *heads, head_dim, words, planes, rule, x.scores, batch, tokens, room)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_heads // self.kv_heads


def why_not_here(request: KernelRequest) -> list[str]:
    """Why no kernels run where the tensors are: every reason."""
    if request.device.type not in DEVICES:
        return [f"its kernels need an NVIDIA GPU, the tensors are on {request.device.type}"]
    other = why_not_nvidia()
    return [*([] if other is None else [other]), *([] if has_triton() else [_NO_TRITON])]


def why_not_shape(request: KernelRequest) -> list[str]:
    """Why no kernels serve queries, keys and values of this kind, and what would: every reason."""
    reasons = []
    if request.dtype not in DTYPES:
        reasons.append(f"it serves bfloat16, float16 and float32, not {str(request.dtype).removeprefix('torch.')}")
    if request.head_dim not in HEAD_DIMS:
        reasons.append(f"it serves head_dim {', '.join(map(str, HEAD_DIMS))}, not {request.head_dim}")
    if not 1 <= request.group <= 16:
        reasons.append(f"it serves 1 to 16 query heads a KV head, not {request.group}")
    if request.tokens > MOST_TOKENS:
        reasons.append(f"it serves up to {MOST_TOKENS} queries at a time, not {request.tokens}")
    return reasons


def why_not_binary(request: KernelRequest) -> list[str]:
    """Why the kernels for binary codes do not serve a step, and what would: every reason."""
    reasons = why_not_here(request)
    if request.device.type not in DEVICES:
        return reasons
    if request.scores != "hamming":
        return [*reasons, "it serves binary codes in a FlatHamming index"]
    reasons += why_not_shape(request)
    if request.words not in (1, 2, 4):
        reasons.append(f"it serves codes of 64, 128 or 256 bits, not {64 * request.words}")
    sizes = request.batch, request.q_heads, request.tokens, request.room, request.words, request.rule
    return [*reasons, *_why_not_rule(request), *_why_not_distances(request), *too_many(*sizes)]


def _why_not_rule(request: KernelRequest) -> list[str]:
    rule, reasons = request.rule, _why_not_calibrated(request)
    if rule.chunks is None:
        return reasons
    if rule.shared:
        reasons.append("LocalTopK makes one choice per query head there, not one for a KV head")
    if rule.per_chunk not in PER_CHUNK:
        reasons.append(f"it serves LocalTopK with per_chunk {', '.join(map(str, PER_CHUNK))}, not {rule.per_chunk}")
    if rule.chunks * rule.per_chunk > MOST_SLOTS:
        reasons.append(f"it serves LocalTopK with k up to {MOST_SLOTS:,}, not {rule.chunks * rule.per_chunk:,}")
    if rule.most_forced > rule.per_chunk:
        reasons.append(f"up to {rule.most_forced} sinks and recents fall into one chunk of LocalTopK: take a larger k")
    return reasons


def _why_not_calibrated(request: KernelRequest) -> list[str]:
    rule, reasons = request.rule, []
    if not rule.calibrated:
        return []
    if rule.chunks is not None or rule.radius is not None:
        reasons.append("it serves Consensus and Momentum around TopK and Tiers, not around LocalTopK and Threshold")
    if request.q_heads > MOST_HEADS:
        reasons.append(f"it counts the votes of up to {MOST_HEADS} query heads, not of {request.q_heads}")
    summed, planes = request.group if rule.shared else 1, 2**request.planes - 1
    span = summed * sum(map(abs, rule.discounts))
    if bins(summed * planes, span) > MOST_BINS:
        most = (MOST_BINS - bins(summed * planes, 0) // 2) // summed
        given = " and ".join(map(str, rule.discounts))
        reasons.append(f"it serves discounts of up to {most} together, not {given}")
    return reasons


def _why_not_distances(request: KernelRequest) -> list[str]:
    rule = request.rule
    summed = request.group if rule.shared else 1
    spread = summed * (2**request.planes - 1)
    farthest = (64 * request.words + 255 * rule.biased) * spread + summed * sum(map(abs, rule.discounts))
    if request.planes <= 2 and farthest + 4 <= MOST_LEVELS:
        return []
    return [f"distances up to {farthest:,} are more than it tells apart: take fewer bits or query_bits"]
