"""ModelGraph: a captured step of a model over one cache, and what has to hold for it to be replayed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from hashattn.core.lasting import lasting
from hashattn.engines.decoder import Decoder
from hashattn.integrations.attached.graph_capture import CAPTURES, CannotCapture
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.model_state import ModelState
from hashattn.integrations.transformers.step_call import StepCall

CACHE = object()  # in the place of the cache among outputs


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a captured step returns: tensors that a replay writes over, and the cache it is called with."""

    kind: type
    names: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, output: Any, cache: Any) -> Outputs:
        """Of what a step returned that was called with this cache.

        Raises:
            CannotCapture: it is neither.
        """
        named = output if isinstance(output, ModelOutput) else dict(enumerate(output)) if type(output) is tuple else {}
        if not named:
            raise CannotCapture(f"it returns a {type(output).__name__}")
        for name, value in named.items():
            if value is not None and value is not cache and not isinstance(value, Tensor):
                raise CannotCapture(f"its output holds {name!r}, a {type(value).__name__}")
        values = tuple(CACHE if value is cache else value for value in named.values())
        return cls(type(output), tuple(map(str, named)), values)

    def given(self, cache: Any) -> Any:
        """The same for whoever called: tensors of their own."""
        values = [cache if x is CACHE else x.clone() if isinstance(x, Tensor) else x for x in self.values]
        return tuple(values) if self.kind is tuple else self.kind(**dict(zip(self.names, values, strict=True)))


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
class ModelGraph:
    """A captured step. It holds neither the cache nor the cache's memory.

    Attributes:
        replay: runs it again.
        inputs: what it reads, by name.
        rewound: int32 [1], columns that it takes back before it begins; zero behind it. None where nobody takes any.
        seen: bool [B, room], columns that are no padding.
        limit: columns up to which it serves.
        nbytes: memory of its own.
        thread: that captured it, and alone replays it: what cuBLAS works in is shared by the graphs of a thread.
    """

    replay: Callable[[], object]
    outputs: Outputs
    inputs: dict[str, Tensor]
    rewound: Tensor | None
    seen: Tensor
    limit: int
    nbytes: int
    state: ModelState
    taken: tuple[Taken, ...]
    thread: int

    @property
    def turns(self) -> bool:
        """Whether it serves fewer columns than there is room for."""
        return self.limit < self.seen.shape[1]

    def begin_at(self, starts: list[int]) -> None:
        """Let the rows begin at these columns, as those of the cache do."""
        columns = torch.arange(self.seen.shape[1], device=self.seen.device)
        torch.ge(columns, torch.tensor(starts, device=columns.device)[:, None], out=self.seen)

    def rewind(self, columns: int) -> None:
        """Let the next replay take back so many columns before it begins."""
        if columns:
            assert self.rewound is not None
            self.rewound.fill_(columns)

    def serves(self, layers: Sequence[HashedLayer], filled: int, tokens: int) -> bool:
        """Whether a step of so many tokens, to so many columns, is still the one that was captured."""
        mine = self.thread == threading.get_ident()
        still = mine and filled + tokens <= self.limit and all(map(Taken.still, self.taken, layers, repeat(filled)))
        return still and self.state.same()


def capture_step(stack: nn.Module, call: StepCall, layers: Sequence[HashedLayer], rewinds: bool) -> ModelGraph:
    """Capture a call of what runs the layers, of a cache whose layers are ready; it leaves nothing in the cache.

    Args:
        rewinds: whether columns are taken back between calls.

    Raises:
        CannotCapture: a step that no graph can hold.
        RuntimeError, ValueError, TypeError: what else went wrong on the way.
    """
    inputs, mask, seen = _inputs(call, layers)
    device = seen.device
    masks = {name: mask for name in call.mask} if isinstance(call.mask, dict) else mask
    given = {**call.fixed, **inputs, "attention_mask": masks, call.cache_name: call.cache}
    state, forward = ModelState(stack), type(stack).forward
    rewound = seen.new_zeros(1, dtype=torch.int32) if rewinds else None
    for layer in layers:
        layer.sync()
        layer.recording, layer.on_device.checking = True, call.why_dense is not None

    def step() -> Any:
        if rewound is not None:
            lengths = [layer.on_device.decoder.length for layer in layers if layer.on_device.decoder is not None]
            torch._foreach_sub_(lengths, [rewound] * len(lengths))
            rewound.zero_()
        return forward(stack, **given)

    try:
        captured = CAPTURES[device.type](step, device)
        outputs = Outputs.of(captured.output, call.cache)
    finally:
        for layer in layers:
            layer.recording = layer.on_device.checking = False
            layer.follow_change()  # the step has run, once or twice
    limit = min(layer.on_device.limit for layer in layers)
    nbytes = captured.nbytes + sum(x.numel() * x.element_size() for x in (*inputs.values(), mask, seen))
    taken = tuple(map(Taken.of, layers))
    thread = threading.get_ident()
    return ModelGraph(captured.replay, outputs, inputs, rewound, seen, limit, nbytes, state, taken, thread)


@lasting
def _inputs(call: StepCall, layers: Sequence[HashedLayer]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What a graph reads; a mask in four dimensions, which is taken as it is; and columns to tell apart."""
    inputs = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in call.changing.items()}
    decoder, shape = layers[0].on_device.decoder, call.shape
    assert decoder is not None and shape is not None
    mask = torch.ones(shape[0], 1, shape[1], 1, dtype=torch.bool, device=decoder.keys.device)
    return inputs, mask, mask.new_empty(shape[0], decoder.room)
