"""Capturing a step of a model, so that it can be replayed: what differs between a GPU and what stands for one."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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


@dataclass(frozen=True)
class Capture:
    """How steps are captured on a kind of device.

    Attributes:
        aside: where those run that will be captured: what they load or make for themselves is there by then.
        capture: a step that has run there. Raises RuntimeError for what the device refuses, or no memory.
    """

    aside: Callable[[torch.device], AbstractContextManager[None]]
    capture: Callable[[Callable[[], Any], torch.device], Captured]


class CannotCapture(Exception):
    """A step that asks or tells the host something; says what."""


class Rehearsal(TorchDispatchMode):
    """Watches a step that will be captured, and says what a capture could not hold.

    One that fails on the way would leave the device's random numbers and memory in its hands.

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


SPARE = 1 << 30  # bytes that are free on a device: a graph finds room there


@contextlib.contextmanager
def _aside_on_cuda(device: torch.device) -> Iterator[None]:
    """The stream of this thread's captures, whose cuBLAS workspaces are its own."""
    with torch.cuda.device(device):
        stream, current = _side_stream(device, threading.get_ident()), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            current.wait_stream(stream)


def _capture_on_cuda(step: Callable[[], Any], device: torch.device) -> Captured:
    """The step as a CUDA graph with memory of its own."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        if torch.cuda.mem_get_info(device)[0] < SPARE:
            torch.cuda.empty_cache()  # torch.cuda.graph() always does, and the next prompt waits for its memory
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(_side_stream(device, threading.get_ident())):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    output = step()
                finally:
                    graph.capture_end()
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


CAPTURES = {"cuda": Capture(_aside_on_cuda, _capture_on_cuda)}  # by kind of device
