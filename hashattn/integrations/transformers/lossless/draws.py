"""Draws: the random numbers by which a text is sampled, token after token, as generate() draws them."""

from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """Numbers that torch.multinomial would draw for the next token of all rows, and for those after it.

    They may be looked at ahead, and asked for again as long as some row has not come to them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._first = device, 0
        self._held: list[tuple[Tensor, Tensor]] = []  # the generator's state before, and what was drawn

    def of(self, token: int, like: Tensor) -> Tensor:
        """Those of the token of this number: float32, of the shape of the chances [B, vocabulary]."""
        while self._first + len(self._held) <= token:
            state = self._state()
            self._held.append((state, torch.empty_like(like).exponential_()))
        return self._held[token - self._first][1]

    def forget(self, token: int) -> None:
        """Let go of those before the token of this number."""
        gone = max(0, min(token - self._first, len(self._held)))
        del self._held[:gone]
        self._first += gone

    def end(self, tokens: int) -> None:
        """Leave the generator as so many tokens leave it."""
        ahead = tokens - self._first
        if 0 <= ahead < len(self._held):
            state = self._held[ahead][0]
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(state, self._device)
            else:
                torch.set_rng_state(state)
        self._held.clear()

    def _state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()
