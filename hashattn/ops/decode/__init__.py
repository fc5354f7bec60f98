"""One decode step fused: scan, exact top-k and attention in two kernels on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hashattn.ops.decode.cuda import InCuda
from hashattn.ops.decode.device import has_triton, why_not_nvidia
from hashattn.ops.decode.estimate import Estimate, Residual
from hashattn.ops.decode.families import FAMILIES
from hashattn.ops.decode.inputs import Before, Inputs, Newest, Outputs, Placed, Stored
from hashattn.ops.decode.kernels import Kernels
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.maps import why_not as why_not_encode
from hashattn.ops.decode.reference import decode as reference
from hashattn.ops.decode.request import DEVICES, DTYPES, HEAD_DIMS, KernelRequest
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.scored import Scored
from hashattn.ops.decode.scratch import Scratch
from hashattn.ops.decode.sizes import Sizes
from hashattn.ops.decode.specification import Specification
from hashattn.ops.decode.triton import InTriton
from hashattn.ops.select.plan import Plan

__all__ = [
    "Before",
    "Estimate",
    "Inputs",
    "KernelRequest",
    "Kernels",
    "Map",
    "Newest",
    "Outputs",
    "Placed",
    "Residual",
    "Rule",
    "Scratch",
    "Sizes",
    "Stored",
]
__all__ += [
    "encodes_many",
    "is_binary",
    "kernels_for",
    "kernels_on",
    "reference",
    "served_by",
    "sizes_of",
    "why_not",
    "why_not_encode",
    "why_not_nvidia",
]

KERNELS: tuple[Kernels, ...] = (InCuda(), InTriton())  # of binary codes, the fastest first
SCORED: tuple[Kernels, ...] = (Scored(),)  # of the other FAMILIES


def of_family(scores: str) -> tuple[Kernels, ...]:
    """The kernels for a family of scores, the fastest first."""
    return SCORED if scores in FAMILIES else KERNELS


def is_binary(request: KernelRequest) -> bool:
    """Whether a step compares binary codes."""
    return of_family(request.scores) is KERNELS


def why_not(request: KernelRequest) -> list[str]:
    """Why no kernels serve a step, as ends of sentences; [] if some do. Of kernels, those that come nearest to it."""
    fewest: list[str] | None = None
    for kernels in reversed(of_family(request.scores)):  # the last serve the most
        reasons = kernels.why_not(request)
        if not reasons:
            return []
        fewest = reasons if fewest is None or len(reasons) < len(fewest) else fewest
    return fewest or []


def kernels_for(request: KernelRequest) -> Kernels:
    """Those that run a step: the fastest that serve it, and on the CPU the specification.

    Raises:
        ValueError: none serve it.
    """
    for kernels in (Specification(), *of_family(request.scores)):
        if not kernels.why_not(request):
            return kernels
    raise ValueError("; ".join(why_not(request)))


def sizes_of(x: Inputs, widths: tuple[tuple[int, ...], tuple[int, ...]] | None = None) -> Sizes | Plan:
    """Sizes of a step: its slots, and the state and the workspace that it is given.

    Args:
        widths: of the hidden layers of maps that the same workspace serves.
    """
    return Plan.of(x) if x.scores != "hamming" else replace(Sizes.of(x), widths=widths or ((), ()))


def kernels_on(device: torch.device) -> Kernels:
    """The fastest that run on a device, whatever the step, and on the CPU the specification."""
    if device.type == "cpu":
        return Specification()
    return next(kernels for kernels in KERNELS if not kernels.why_not_on(device))


def encodes_many(k: Tensor, widths: tuple[tuple[int, ...], tuple[int, ...]] | None) -> bool:
    """Whether keys [B, Hkv, n, D] are encoded in one kernel, by maps of such hidden layers; of keys by a linear one."""
    if k.device.type not in DEVICES or widths is None or widths[1] or k.requires_grad or torch.compiler.is_compiling():
        return False
    return k.dtype in DTYPES and k.shape[3] in HEAD_DIMS and why_not_nvidia() is None and has_triton()


def served_by(request: KernelRequest) -> tuple[Kernels, list[str]]:
    """The fastest kernels that serve a step which some serve, and why no faster ones do, as ends of sentences."""
    found = [(kernels, kernels.why_not(request)) for kernels in of_family(request.scores)]
    first = next(i for i, (_, reasons) in enumerate(found) if not reasons)
    return found[first][0], [reason for _, reasons in found[:first] for reason in reasons]
