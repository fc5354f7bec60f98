"""The fused decode step in CUDA C++: exact top-k attention in two kernels, LocalTopK in one.

One more comes between the two where distances are calibrated.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hashattn.ops.decode.cuda.launches import launches
from hashattn.ops.decode.device import check_nvidia, on, stream_of
from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.inputs import Before, Inputs, Outputs
from hashattn.ops.decode.sizes import LEVELS, Sizes, places

WIDEST = 16  # bytes that kernels read at a time
_POINTERS = "q keys values query codes starts length bounds totals arrived counted "  # in the struct's order
_POINTERS += "lists counts parts stats histograms ids out lse marks nearer new_totals new_counts kept kept_weights "
_POINTERS += "weights norms centre a tier"
_DOUBLES, _FLOATS = "share critical", "scale ratio per_bit"
_INTS = "k least radius sinks recents margin room code_room chunks count_stride slots kv_heads "
_INTS += "votes agreement prior kept_heads kept_slots norm_room"


class Arguments(ctypes.Structure):
    """What the kernels are given: struct Step of step.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_double) for name in _DOUBLES.split()),
        *((name, ctypes.c_float) for name in _FLOATS.split()),
        *((name, ctypes.c_int) for name in _INTS.split()),
    )


class Prepared:
    """A step whose struct and launches are made: a call writes where its queries and results are, and launches.

    It neither waits for the device nor asks it anything, and serves one thread at a time.

    Args:
        like: q may be any view; the others are contiguous, and keys, values and workspace begin at a multiple of 16
            bytes.
        scan_only: launch the first kernel alone, to time it; what is returned is not written then.

    Raises:
        ValueError: they are or do not.
        RuntimeError: a kernel does not compile.
    """

    def __init__(self, like: Inputs, scan_only: bool = False) -> None:
        check_nvidia(like.q.device)
        sizes, stored, bounds, workspace = Sizes.of(like), like.stored, like.bounds, like.workspace
        assert bounds is not None and workspace is not None
        _check_wide(keys=stored.keys, values=stored.values, workspace=workspace)
        self._device, self._held = like.q.device, (stored, like.starts, bounds, workspace)
        ids = sizes.batch, sizes.q_heads // sizes.summed, sizes.tokens, sizes.slots
        self._lse = like.q.new_empty(like.q.shape[:3], dtype=torch.float32)  # what is made like another is made sooner
        self._ids = like.q.new_empty(ids, dtype=torch.int32)
        self._tier = torch.empty_like(self._ids, dtype=torch.int8) if like.estimate is not None else None
        self._prior = sizes.rule.prior_ratio is not None
        self._arguments = arguments = _arguments(like, sizes, bounds, places(workspace.data_ptr(), sizes.cuda))
        if like.estimate is not None:
            self._estimate = _estimated(arguments, like.estimate)  # what is pointed to stays
        if scan_only:  # what the second kernel would leave at zero is left alone
            arguments.totals = arguments.parts
        aligned = sizes.code_room * sizes.words % 2 == 0 and stored.codes.data_ptr() % 16 == 0
        with on(self._device):
            multiprocessors = torch.cuda.get_device_properties(self._device).multi_processor_count
            tiers = like.estimate is not None
            plan = launches(sizes, like.q.dtype, like.causal, aligned, multiprocessors, tiers)
            plan = plan[:1] if scan_only and sizes.rule.chunks is None else plan
            self._launchers = [one.bound(arguments, self._device) for one in plan]

    def __call__(self, q: Tensor, query: Tensor, scale: float, before: Before | None = None) -> Outputs:
        """See :func:`hashattn.ops.decode.reference.decode`.

        Raises:
            RuntimeError: a kernel does not launch.
        """
        arguments, q = self._arguments, q.contiguous()
        if q.data_ptr() % WIDEST:
            q = q.clone()
        out, lse, ids = torch.empty_like(q), torch.empty_like(self._lse), torch.empty_like(self._ids)
        arguments.q, arguments.query, arguments.scale = q.data_ptr(), query.data_ptr(), scale
        arguments.out, arguments.lse, arguments.ids = out.data_ptr(), lse.data_ptr(), ids.data_ptr()
        tier = weights = None
        if self._tier is not None:
            tier = torch.empty_like(self._tier)
            arguments.tier = tier.data_ptr()
        if self._prior:
            weights = lse.new_empty((*lse.shape, ids.shape[-1]))
            arguments.weights = weights.data_ptr()
            before = None if before is None else Before(before.ids.contiguous(), before.weights.float().contiguous())
            _hand_on(arguments, before)
        with on(self._device):
            stream = stream_of(self._device)
            for launch in self._launchers:
                launch(stream)
        return Outputs(out, lse, ids, tier, weights)


def decode(x: Inputs, scan_only: bool = False) -> Outputs:
    """One step, made ready for itself alone."""
    return Prepared(x, scan_only)(x.q, x.query, x.scale, x.before)


def _arguments(x: Inputs, sizes: Sizes, bounds: Tensor, buffers: dict[str, int]) -> Arguments:
    """All but what a call gives; buffers: where they begin."""
    rule, stored = sizes.rule, x.stored
    tensors = {"keys": stored.keys, "values": stored.values, "codes": stored.codes, "length": stored.length}
    arrived, counted, totals = (bounds[sizes.hints + i] for i in range(3))
    tensors |= {"starts": x.starts, "bounds": bounds, "arrived": arrived, "counted": counted, "totals": totals}
    found = Arguments(**{name: tensor.data_ptr() for name, tensor in tensors.items()}, **buffers)
    found.share = rule.share or 0.0
    found.k, found.least, found.radius = rule.k or 0, rule.least, min(rule.radius or 0, sizes.farthest)
    found.sinks, found.recents, found.margin = rule.sinks, rule.recents, sizes.margin
    found.room, found.code_room, found.kv_heads = sizes.room, sizes.code_room, sizes.kv_heads
    found.chunks, found.count_stride, found.slots = sizes.cuda_chunks, sizes.count_stride, sizes.slots
    if rule.calibrated:
        kept = bounds[sizes.hints + 2 + LEVELS :]
        found.new_totals, found.marks = kept.data_ptr(), -(-kept[LEVELS:].data_ptr() // 8) * 8
        votes, prior = (discount * sizes.summed // sizes.unit for discount in rule.discounts)
        found.votes, found.agreement, found.prior = rule.votes(sizes.q_heads), votes, prior
        found.ratio = (rule.prior_ratio or 0.0) * sizes.q_heads
    found.critical = rule.critical or 0.0
    return found


def _estimated(found: Arguments, by: Estimate) -> tuple[Tensor, ...]:
    """Give the arguments what logits are estimated from. Returns the tensors that they point to."""
    a = by.a.detach().float()  # the tensor itself if it is float32
    found.norms, found.centre, found.a = by.norms.data_ptr(), by.centre.data_ptr(), a.data_ptr()
    found.norm_room, found.per_bit = by.norms.shape[2], 2 / by.bits
    return by.norms, by.centre, a


def _hand_on(found: Arguments, before: Before | None) -> None:
    """Give the arguments what the layer before kept, contiguous; None if it ran dense."""
    if before is None:
        found.kept = None
        return
    found.kept, found.kept_weights = (x.data_ptr() for x in before)
    found.kept_heads, found.kept_slots = before.ids.shape[1], before.ids.shape[3]


def _check_wide(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.data_ptr() % WIDEST or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and begin at a multiple of {WIDEST} bytes, got strides {x.stride()} at "
                f"{x.data_ptr():#x}: give a copy, {name}.clone(memory_format=torch.contiguous_format)"
            )
