"""StepRun: a kind of step that has run as it will be captured, with lengths on the device."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.engines.decoder import Decoder
from hashattn.integrations.attached.graph_capture import CAPTURES, Rehearsal
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.model_state import ModelState
from hashattn.integrations.transformers.outputs import Outputs
from hashattn.integrations.transformers.step_call import StepCall


@dataclass(frozen=True, eq=False)
class Taken:
    """What took the steps of one layer when they were captured."""

    decoder: weakref.ref[Decoder]
    parts: object

    @classmethod
    def of(cls, layer: HashedLayer) -> Taken:
        """What takes them now."""
        decoder = layer.on_device.decoder
        assert decoder is not None
        return cls(weakref.ref(decoder), decoder.parts)

    def still(self, layer: HashedLayer, filled: int) -> bool:
        """Whether it still does, of a layer that holds so many columns."""
        steps, kv = layer.on_device, layer.kv
        decoder = steps.decoder
        same = decoder is not None and decoder is self.decoder() and decoder.parts is self.parts
        return same and kv is not None and steps.untouched(kv, filled)


@dataclass(frozen=True, eq=False)
class StepRun:
    """A step that has run: its kernels are loaded, and what libraries make for themselves is made.

    Attributes:
        limit: columns up to which steps are like it.
        thread: that ran it, and alone replays what it captures: what cuBLAS works in is shared by its graphs.
    """

    limit: int
    state: ModelState
    taken: tuple[Taken, ...]
    thread: int

    @classmethod
    def of(cls, stack: nn.Module, layers: Sequence[HashedLayer]) -> StepRun:
        """Of one that this thread has just run."""
        limit = min(layer.on_device.limit for layer in layers)
        return cls(limit, ModelState(stack), tuple(map(Taken.of, layers)), threading.get_ident())

    def serves(self, layers: Sequence[HashedLayer], filled: int, tokens: int) -> bool:
        """Whether a step of so many tokens, to so many columns, is still the same."""
        mine = self.thread == threading.get_ident()
        still = mine and filled + tokens <= self.limit and all(map(Taken.still, self.taken, layers, repeat(filled)))
        return still and self.state.same()


def run_step(stack: nn.Module, call: StepCall, layers: Sequence[HashedLayer], *, watched: bool) -> tuple[Any, StepRun]:
    """Run a call of what runs the layers, of a cache whose layers are ready: the device appends, and nobody is told.

    Args:
        watched: whether it is looked at for what a capture could not hold.

    Returns:
        What it returns, and what can be captured now. Whatever is raised, nothing is left in the cache.

    Raises:
        CannotCapture: a step that no graph can hold.
        RuntimeError, ValueError, TypeError: what else went wrong on the way.
    """
    given, device = arguments(call, call.changing, full_mask(call, layers)), device_of(layers)
    try:
        rehearsal = Rehearsal() if watched else contextlib.nullcontext()
        with recording(layers, call), CAPTURES[device.type].aside(device), rehearsal:
            output = type(stack).forward(stack, **given)
        return Outputs.of(output, call.cache).given(call.cache), StepRun.of(stack, layers)
    except BaseException:
        for layer in layers:
            layer.follow_change()
        raise


@contextlib.contextmanager
def recording(layers: Sequence[HashedLayer], call: StepCall) -> Iterator[None]:
    """Within it calls of the layers are steps that a graph can hold."""
    for layer in layers:
        layer.sync()
        layer.recording, layer.on_device.checking = True, call.why_dense is not None
    try:
        yield
    finally:
        for layer in layers:
            layer.recording = layer.on_device.checking = False


def arguments(call: StepCall, inputs: dict[str, Tensor], mask: Tensor) -> dict[str, Any]:
    """What a model's forward() is given in such a step."""
    masks = {name: mask for name in call.mask} if isinstance(call.mask, dict) else mask
    return {**call.fixed, **inputs, "attention_mask": masks, call.cache_name: call.cache}


def full_mask(call: StepCall, layers: Sequence[HashedLayer]) -> Tensor:
    """A mask in four dimensions, which a model takes as it is, and nobody reads: bool [B, 1, T, 1]."""
    assert call.shape is not None
    return torch.ones(call.shape[0], 1, call.shape[1], 1, dtype=torch.bool, device=device_of(layers))


def device_of(layers: Sequence[HashedLayer]) -> torch.device:
    """Where steps of the layers run."""
    decoder = layers[0].on_device.decoder
    assert decoder is not None
    return decoder.keys.device
