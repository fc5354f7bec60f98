"""Contenders that take turns, a token each, so that a noisy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.lab.workload.model import cache_argument

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


@dataclass
class Decoding:
    """Greedy decoding by one contender, behind a text whose last token it is given.

    Attributes:
        model: its own, with what is attached to it.
        cache: its own, of the text but for that token.
        newest: int64 [1, 1], the token that comes next.
        written: the tokens so far.
        seconds: that each took, the device waited for.
    """

    model: PreTrainedModel
    cache: DynamicCache
    newest: Tensor
    written: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @torch.inference_mode()
    def step(self) -> None:
        """Write a token."""
        began = time.perf_counter()
        call = {cache_argument(self.model): self.cache, "use_cache": True, "logits_to_keep": 1}
        self.newest = self.model(input_ids=self.newest, **call).logits[:, -1:].argmax(-1)
        self.written.append(int(self.newest))  # waits for the device
        self.seconds.append(time.perf_counter() - began)


def take_turns(contenders: Sequence[Decoding], tokens: int) -> None:
    """Let each write so many tokens. With every token another one begins."""
    for turn in range(tokens):
        first = turn % len(contenders)
        for each in (*contenders[first:], *contenders[:first]):
            each.step()
