"""ModelGraph: a captured step of a model over one cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.core.lasting import lasting
from hashattn.integrations.attached.graph_capture import CAPTURES
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.outputs import Outputs
from hashattn.integrations.transformers.step_call import StepCall
from hashattn.integrations.transformers.step_run import StepRun, arguments, device_of, full_mask, recording


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A captured step. It holds neither the cache nor the cache's memory.

    Attributes:
        replay: runs it again.
        run: the step that was captured, and what has to hold for it to be replayed.
        inputs: what it reads, by name.
        rewound: int32 [1], columns that it takes back before it begins; zero behind it. None where nobody takes any.
        seen: bool [B, room], columns that are no padding.
        nbytes: memory of its own.
    """

    replay: Callable[[], object]
    run: StepRun
    outputs: Outputs
    inputs: dict[str, Tensor]
    rewound: Tensor | None
    seen: Tensor
    nbytes: int

    @property
    def turns(self) -> bool:
        """Whether it serves fewer columns than there is room for."""
        return self.run.limit < self.seen.shape[1]

    def begin_at(self, starts: list[int]) -> None:
        """Let the rows begin at these columns, as those of the cache do."""
        columns = torch.arange(self.seen.shape[1], device=self.seen.device)
        torch.ge(columns, torch.tensor(starts, device=columns.device)[:, None], out=self.seen)

    def rewind(self, columns: int) -> None:
        """Let the next replay take back so many columns before it begins."""
        if columns:
            assert self.rewound is not None
            self.rewound.fill_(columns)


def capture_step(
    stack: nn.Module, call: StepCall, layers: Sequence[HashedLayer], run: StepRun, rewinds: bool
) -> ModelGraph:
    """Capture a call of what runs the layers, as one that has run; it leaves nothing in the cache.

    Args:
        rewinds: whether columns are taken back between calls.

    Raises:
        CannotCapture: a step that no graph can hold.
        RuntimeError, ValueError, TypeError: what else went wrong on the way.
    """
    inputs, mask, seen = _inputs(call, layers)
    given, device, forward = arguments(call, inputs, mask), device_of(layers), type(stack).forward
    rewound = seen.new_zeros(1, dtype=torch.int32) if rewinds else None

    def step() -> Any:
        if rewound is not None:
            lengths = [layer.on_device.decoder.length for layer in layers if layer.on_device.decoder is not None]
            torch._foreach_sub_(lengths, [rewound] * len(lengths))
            rewound.zero_()
        return forward(stack, **given)

    try:
        with recording(layers, call):
            captured = CAPTURES[device.type].capture(step, device)
        outputs = Outputs.of(captured.output, call.cache)
    finally:
        for layer in layers:
            layer.follow_change()  # where a capture runs the step
    nbytes = captured.nbytes + sum(x.numel() * x.element_size() for x in (*inputs.values(), mask, seen))
    return ModelGraph(captured.replay, run, outputs, inputs, rewound, seen, nbytes)


@lasting
def _inputs(call: StepCall, layers: Sequence[HashedLayer]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What a graph reads, its mask, and columns to tell apart."""
    inputs = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in call.changing.items()}
    decoder, mask = layers[0].on_device.decoder, full_mask(call, layers)
    assert decoder is not None
    return inputs, mask, mask.new_empty(mask.shape[0], decoder.room)
