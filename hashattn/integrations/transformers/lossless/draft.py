"""Draft: what searched attention would go on to write, guessed token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hashattn.integrations.transformers.lossless.writer import Writer

UNKNOWN = -1


@dataclass
class Draft:
    """Tokens that are not written yet.

    Where tokens are sampled, the draws of those that come next are looked at ahead, so that a draft guesses what they
    will choose; they are drawn again when that is written. Whatever a draft guesses, what is written is the same.

    Attributes:
        tokens: int64 [B, length].
        known: int64 [B, n], tokens that a check has found already, UNKNOWN elsewhere.
    """

    tokens: Tensor
    known: Tensor
    _draws: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(cls, writer: Writer, known: Tensor) -> Draft:
        """An empty one."""
        return cls(writer.ids[:, :0], known)

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def extend(self, writer: Writer, length: int, step: Callable[[Tensor], Tensor]) -> None:
        """Add tokens up to so many.

        Args:
            step: the logits [B, vocabulary] of searched attention after the last of these tokens [B, n].
        """
        state = _random_state(writer.ids.device) if writer.config.do_sample else None
        ended = ~writer.unfinished
        try:
            while len(self) < length:
                ids = torch.cat([writer.ids, self.tokens], -1)
                tokens = self._guess(writer, ids, step(ids), len(self))
                if tokens is None:
                    return
                if len(self) < self.known.shape[1]:
                    known = self.known[:, len(self)]
                    tokens = torch.where(known == UNKNOWN, tokens, known)
                tokens = writer.padded(tokens, ended)
                if writer.ends is not None:
                    ended = ended | torch.isin(tokens, writer.ends)
                self.tokens = torch.cat([self.tokens, tokens[:, None]], -1)
        finally:
            if state is not None:
                _set_random_state(writer.ids.device, state)

    def ahead(self, writer: Writer, logits: Tensor, written: int, agree: Tensor) -> Tensor:
        """What a check tells beyond the tokens that were written, of rows whose draft was right further than others'.

        Args:
            logits: of the check, [B, length + 1, vocabulary].
            written: tokens of the draft's positions that were written.
            agree: bool [B], rows that had drafted all of them.

        Returns:
            int64 [B, n], UNKNOWN where nothing is known; for the next draft.
        """
        known = []
        last = len(self._draws) if writer.config.do_sample else len(self) + 1  # beyond, nobody has looked at the draws
        for i in range(written, last):
            ids = torch.cat([writer.ids, self.tokens[:, written:i]], -1)
            tokens = self._guess(writer, ids, logits[:, i], i)
            if tokens is None:
                break
            known.append(torch.where(agree & writer.unfinished, tokens, UNKNOWN))
            if i < len(self):
                agree = agree & (tokens == self.tokens[:, i])
        return torch.stack(known, -1) if known else self.known[:, :0]

    def _guess(self, writer: Writer, ids: Tensor, logits: Tensor, position: int) -> Tensor | None:
        """The token that is chosen at a position, int64 [B]; None where a processor refuses what was drafted."""
        try:
            scores = writer.scores(ids, logits)
        except Exception:  # of a text that may never be written; if it is, the check says the same
            return None
        if not writer.config.do_sample:
            return scores.argmax(-1)
        chances = scores.softmax(-1)
        while len(self._draws) <= position:
            self._draws.append(torch.empty_like(chances).exponential_())
        return (chances / self._draws[position]).argmax(-1)  # as torch.multinomial draws one


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
