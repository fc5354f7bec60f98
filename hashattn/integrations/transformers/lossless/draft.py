"""Draft: what searched attention would go on to write, guessed token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.integrations.transformers.lossless.writer import Writer


@dataclass
class Draft:
    """Tokens behind a writer's texts that are not written yet.

    Where tokens are sampled, the draws of those that come next are looked at ahead, so that a draft guesses what they
    will choose. Whatever a draft guesses, what is written is the same.

    Attributes:
        length: tokens that are drafted for each row.
    """

    length: int = 0

    def __len__(self) -> int:
        return self.length

    def extend(self, writer: Writer, length: int, step: Callable[[int], Tensor]) -> None:
        """Add tokens up to so many.

        Args:
            step: the logits [B, vocabulary] of searched attention after so many of these tokens.
        """
        ended = ~torch.tensor(writer.unfinished, device=writer.device)
        while self.length < length:
            tokens = self._guess(writer, step(self.length))
            if tokens is None:
                return
            tokens = writer.padded(tokens, ended)
            if writer.ends is not None:
                ended = ended | torch.isin(tokens, writer.ends)
            writer.put(tokens, self.length)
            self.length += 1

    def _guess(self, writer: Writer, logits: Tensor) -> Tensor | None:
        """The token that is chosen next, int64 [B]; None where a processor refuses what was drafted."""
        try:
            return writer.choose(logits, self.length)
        except Exception:  # of a text that may never be written; if it is, the check says the same
            return None
