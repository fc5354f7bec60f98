"""model.generate() as users call it, with a look at the clock for every token."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONE_PASS = 1 << 17  # tokens of all rows that are read at once: 11 GB of activations in a model of Llama-3-8B's shape
CHUNK = 4096


@dataclass(frozen=True)
class Call:
    """How generate() is called: greedily, over a whole prompt.

    Attributes:
        static: with a static cache, for whose steps transformers compiles the model; otherwise its default.
        chunk: tokens of the prompt that are read at once; None for all, or CHUNK where these are more than ONE_PASS.
    """

    static: bool
    chunk: int | None = None

    def arguments(self, ids: Tensor, tokens: int) -> dict[str, Any]:
        """Of generate(), to write so many tokens behind ids [B, N]."""
        given: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        given |= {"attention_mask": torch.ones_like(ids)}
        if self.static:
            given |= {"cache_implementation": "static"} | _compiled_anywhere(ids.device)
        if chunk := self.chunk_of(*ids.shape):
            given["prefill_chunk_size"] = chunk
        return given

    def chunk_of(self, batch: int, tokens: int) -> int | None:
        """The chunk for a prompt; None to read it in one pass."""
        chunk = self.chunk or (CHUNK if batch * tokens > ONE_PASS else tokens)
        if chunk >= tokens:
            return None
        return chunk + 1 if tokens % chunk == 1 else chunk  # one token alone would be a decode step


@dataclass(frozen=True)
class Timed:
    """A call of generate().

    Attributes:
        prefill: seconds until the first token was written.
        steps: seconds of each token after it.
        memory: bytes that torch holds when the last one is written, free blocks given back; None on a CPU.
        peak: bytes in use at most, prefill included; None on a CPU.
    """

    prefill: float
    steps: list[float]
    memory: int | None
    peak: int | None

    @property
    def seconds(self) -> float:
        """Of the whole call."""
        return self.prefill + sum(self.steps)


def timed(network: PreTrainedModel, ids: Tensor, call: Call, tokens: int) -> Timed:
    """Write so many tokens, at least two, behind ids [B, N], greedily; the device is waited for at each."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    device, ticks, memory = ids.device, list[float](), list[int]()

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            _wait(device)
            ticks.append(time.perf_counter())
            if len(ticks) == tokens and device.type == "cuda":  # while the cache is there
                torch.cuda.empty_cache()
                memory.extend((torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _wait(device)
    began = time.perf_counter()
    clock = StoppingCriteriaList([Clock()])
    network.generate(ids, stopping_criteria=clock, **call.arguments(ids, tokens))  # type: ignore[operator]
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    held, peak = memory or (None, None)
    return Timed(ticks[0] - began, steps, held, peak)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compiled_anywhere(device: torch.device) -> dict[str, Any]:
    """transformers compiles on GPUs by itself; elsewhere it has to be told."""
    if device.type == "cuda":
        return {}
    from transformers import CompileConfig

    config = CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]  # its only way to say so
    return {"compile_config": config}
