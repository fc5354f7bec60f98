"""Capturing a step of a model, so that it can be replayed: what differs between a GPU and what stands for one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, eq=False)
class Captured:
    """A step that was captured. It points to memory that others have to keep.

    Attributes:
        replay: runs it again, over what its inputs now hold.
        output: what the step returned; a replay writes over its tensors.
        nbytes: memory that it keeps for itself, as far as that is known.
    """

    replay: Callable[[], object]
    output: Any
    nbytes: int


Capture = Callable[[Callable[[], Any], torch.device], Captured]


class CannotCapture(Exception):
    """A step that asks or tells the host something; says what."""


class Rehearsal(TorchDispatchMode):
    """A step runs once before it is captured: that loads its kernels, and says what a capture could not hold.

    A capture that fails on the way would leave the device's random numbers and memory in its hands.

    Raises:
        CannotCapture: the step waits for the device, or copies between host and device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        made = name == "lift_fresh" and args[0].device.type != "cpu"  # of numbers, on the host
        copied, picked = name in COPYING and _crosses(args, kwargs), name in PICKING and _by_mask(args)
        if name in WAITING or made or copied or picked:
            raise CannotCapture(f"a step of it waits for the device (aten::{name})")
        return func(*args, **kwargs)


WAITING = frozenset(
    ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount")
)
COPYING = frozenset(("_to_copy", "copy_"))
PICKING = frozenset(("index", "index_put", "index_put_", "repeat_interleave"))


def _crosses(args: Any, kwargs: Any) -> bool:
    """Whether a copy goes from one kind of device to another."""
    to = kwargs.get("device")
    kinds = {x.device.type for x in args if isinstance(x, Tensor)} | ({torch.device(to).type} if to else set())
    return len(kinds - {"meta"}) > 1


def _by_mask(args: Any) -> bool:
    """Whether the shape of what is picked depends on values: those of a mask, or of counts."""
    picked = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else args[:1]
    masks = [x for x in picked if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
    return bool(masks) or len(args) == 1


def capture_on_cuda(step: Callable[[], Any], device: torch.device) -> Captured:
    """The step as a CUDA graph with memory of its own. Before that it runs once, on the same stream.

    Raises:
        CannotCapture: see :class:`Rehearsal`.
        RuntimeError: what else CUDA refuses, or no memory.
    """
    with torch.cuda.device(device):
        stream, current = _side_stream(device, threading.get_ident()), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), Rehearsal():
            step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                output = step()
        except RuntimeError:
            _recover()
            raise
    return Captured(graph.replay, output, _pool_nbytes(graph))


def _pool_nbytes(graph: torch.cuda.CUDAGraph) -> int:
    """Memory of a graph's own; 0 where another allocator than PyTorch's is used, which cannot be asked."""
    if torch.cuda.get_allocator_backend() != "native":
        return 0
    own, segments = tuple(graph.pool()), torch.cuda.memory_snapshot()
    return sum(int(s["total_size"]) for s in segments if tuple(s["segment_pool_id"]) == own)


def _recover() -> None:
    """Take the device's random numbers out of the hands of a capture that failed, by one that does not."""
    _side_stream.cache_clear()  # whose memory it may still have begun to keep
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")


@functools.cache
def _side_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for all captures of a thread: cuBLAS keeps a workspace for each that it sees."""
    return torch.cuda.Stream(device)


CAPTURES: dict[str, Capture] = {"cuda": capture_on_cuda}  # by kind of device
