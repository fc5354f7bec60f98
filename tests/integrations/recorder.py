"""What stands for CUDA graphs on the CPU: a step is recorded operator by operator, and replayed on the same memory.

As in a graph, whatever the host knew when it was recorded stays what it was, and a look at a value is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hashattn.integrations.attached import graph_capture
from hashattn.integrations.attached.graph_capture import Capture, Captured
from hashattn.ops import decode
from hashattn.ops.decode.specification import Specification


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Recorded(TorchDispatchMode):
    """The operators of a step, and what they were given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.record(lambda: func(*args, **kwargs), (args, kwargs), out)
        return out

    def record(self, run, given, out):
        held = {x.untyped_storage().data_ptr() for x in tensors(given)}
        made = [x.untyped_storage().data_ptr() not in held for x in tensors(out)]
        self.calls.append((run, tensors(out), made))

    def replay(self):
        for run, outs, made in self.calls:
            for held, new, fresh in zip(outs, tensors(run()), made, strict=True):
                if fresh:
                    held.copy_(new)


RECORDING: list[Recorded] = []


def record(step, device):
    """Stands for a capture on a GPU."""
    recorded = Recorded()
    RECORDING.append(recorded)
    try:
        with recorded:
            output = step()
    finally:
        RECORDING.pop()
    return Captured(recorded.replay, output, 1000)


def opaque(make):
    """What stands for kernels: one operator of a graph, though it looks at values on the CPU."""

    def made(self, like):
        run = make(self, like)

        def step(*given):
            with _disable_current_modes():
                out = run(*given)
            if RECORDING:
                RECORDING[-1].record(lambda: run(*given), given, out)
            return out

        return step

    return made


@pytest.fixture
def graphs_anywhere(monkeypatch):
    """Graphs on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other longer than such small operators take
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setitem(graph_capture.CAPTURES, "cpu", Capture(contextlib.nullcontext, record))
    for what in ("decode", "encode"):
        monkeypatch.setattr(Specification, what, opaque(getattr(Specification, what)))
    yield
    torch.set_num_threads(threads)
