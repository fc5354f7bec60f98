"""Writer: what generate() writes, token by token, as transformers' own loop does once it has logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hashattn.integrations.transformers.lossless.draws import Draws

AHEAD = 256  # columns of a text that are allocated at once


class Writer:
    """The texts of a batch's rows so far, and what decides how they go on.

    A row's text may be longer than another's. Behind it stand the tokens that are drafted for it.

    Attributes:
        lengths: tokens of each row's text, prompt and padding included.
        unfinished: rows that go on.
        ends: the tokens that end a row; None where none does.
    """

    def __init__(
        self,
        ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
    ) -> None:
        self._ids, self.processors, self.criteria, self.config = ids, processors, criteria, config
        self.streamer, self.device = streamer, ids.device
        batch, self._prompt = ids.shape
        self.lengths, self.unfinished = [self._prompt] * batch, [True] * batch
        self._draws = Draws(ids.device)
        pad = config._pad_token_tensor
        self._pad: Any = None if pad is None else pad.to(ids.device)
        ends = [x.eos_token_id for x in criteria if hasattr(x, "eos_token_id")]
        self.ends = torch.cat([x.flatten() for x in ends]).to(ids.device) if ends else None
        self._others = StoppingCriteriaList(x for x in criteria if not hasattr(x, "eos_token_id"))
        wanted = bool(config.return_dict_in_generate)
        self._scores: list[Tensor] | None = [] if wanted and config.output_scores else None
        self._logits: list[Tensor] | None = [] if wanted and config.output_logits else None
        self._hidden: list[Any] | None = [] if wanted and config.output_hidden_states else None

    @property
    def done(self) -> bool:
        """Whether no row goes on."""
        return not any(self.unfinished)

    @property
    def room(self) -> int:
        """Tokens that may still be written to some row."""
        going = [n for n, more in zip(self.lengths, self.unfinished, strict=True) if more]
        return int(self.config.max_length) - min(going, default=int(self.config.max_length))

    def why_together(self) -> str | None:
        """Why rows have to be as long as each other after every pass; None if they need not."""
        if len(self.lengths) == 1:
            return "there is one row"
        if self.streamer is not None:
            return "a streamer is given a token of every row at a time"
        if any(x is not None for x in (self._scores, self._logits, self._hidden)):
            return "scores, logits or states are to be returned, token by token of all rows"
        own = [x for x in (*self.processors, *self.criteria) if not type(x).__module__.startswith("transformers.")]
        if own:
            return f"a {type(own[0]).__name__} of one's own is asked for all rows"
        if self.ends is None and any(not hasattr(x, "max_length") for x in self.criteria):
            return "rows that have ended are written on, there being no token that ends them"
        return None

    def tokens(self, ahead: int, count: int) -> Tensor:
        """Tokens of each row from its last one on, those behind it being drafted: int64 [B, count].

        Args:
            ahead: tokens between the last one and the first of these.
        """
        first = torch.tensor(self.lengths, device=self.device)[:, None] - 1 + ahead
        at = (first + torch.arange(count, device=self.device)).clamp(max=self._ids.shape[1] - 1)
        return self._ids.gather(1, at)  # beyond, there is nothing that counts

    def text(self, ahead: int) -> Tensor:
        """The texts of rows of one length, with so many drafted tokens: int64 [B, N + ahead]."""
        return self._ids[:, : self.lengths[0] + ahead]

    def choose(self, logits: Tensor, ahead: int) -> Tensor:
        """The tokens [B] that follow each row's text and so many drafted tokens, by its logits [B, vocabulary]."""
        return self._chosen(self._scored(logits.to(torch.float32, copy=True), ahead), ahead)

    def put(self, tokens: Tensor, ahead: int, rows: list[bool] | None = None) -> None:
        """Let tokens [B] stand behind each row's text and so many drafted tokens; of these rows alone, if given."""
        last = max(self.lengths) + ahead
        if last >= self._ids.shape[1]:
            more = self._ids.new_zeros(len(self._ids), last + AHEAD - self._ids.shape[1])
            self._ids = torch.cat([self._ids, more if self._pad is None else more + self._pad], 1)
        at = torch.tensor(self.lengths, device=self.device)[:, None] + ahead
        if rows is not None and not all(rows):
            tokens = torch.where(torch.tensor(rows, device=self.device), tokens, self._ids.gather(1, at)[:, 0])
        self._ids.scatter_(1, at, tokens[:, None])

    def write(self, logits: Tensor, ahead: int, rows: list[bool], hidden: Any = None) -> tuple[Tensor, Tensor]:
        """Write the next tokens of these rows, so far behind their lengths, which :meth:`advance` settles.

        Args:
            logits: [B, vocabulary].
            hidden: states of this position, of each layer.

        Returns:
            the tokens, int64 [B], and the rows that have ended, bool [B]; both mean nothing for other rows.
        """
        raw = logits.to(dtype=torch.float32, device=self.device, copy=True)
        scores = self._scored(raw, ahead)
        for kept, value in ((self._scores, scores), (self._logits, raw), (self._hidden, hidden)):
            if kept is not None:
                kept.append(value)
        tokens = self.padded(self._chosen(scores, ahead), ~torch.tensor(self.unfinished, device=self.device))
        self.put(tokens, ahead, rows)
        given = None if self._scores is None else tuple(self._scores)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=self.device)
        if self.ends is not None:
            ended = torch.isin(tokens, self.ends)
        if len(self._others):
            ended = ended | self._by_length(ahead + 1, lambda ids, n: self._others(ids, given), ended)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        return tokens, ended

    def padded(self, tokens: Tensor, ended: Tensor) -> Tensor:
        """The tokens [B] that are written, as rows that have ended are padded where there is a token that ends them."""
        return tokens if self.ends is None else torch.where(ended, self._pad, tokens)

    def advance(self, written: list[int], ended: list[bool]) -> None:
        """Count the tokens that were written to each row, and the rows that have ended."""
        self.lengths = [n + more for n, more in zip(self.lengths, written, strict=True)]
        for row, now in enumerate(ended):
            if now and self.unfinished[row] and self.ends is not None:
                self._ids[row, self.lengths[row] :] = self._pad  # drafts stood there
        self.unfinished = [more and not now for more, now in zip(self.unfinished, ended, strict=True)]
        self._draws.forget(min(self.lengths) - self._prompt)

    def end(self) -> None:
        """Leave the random numbers to others."""
        self._draws.end(max(self.lengths) - self._prompt)

    def result(self, cache: Any) -> Any:
        """What generate() returns."""
        if self.streamer is not None:
            self.streamer.end()
        ids = self._ids[:, : max(self.lengths)]
        if not self.config.return_dict_in_generate:
            return ids
        kept = {"scores": self._scores, "logits": self._logits, "hidden_states": self._hidden}
        outputs: dict[str, Any] = {name: None if value is None else tuple(value) for name, value in kept.items()}
        names = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
        name = "cache" if "cache" in names else "past_key_values"  # which transformers 5.24 renamed
        outputs |= {"sequences": ids, name: cache}
        return GenerateDecoderOnlyOutput(**outputs)

    # ---- inside

    def _scored(self, raw: Tensor, ahead: int) -> Tensor:
        """What tokens are chosen by: float32 [B, vocabulary]."""
        if not len(self.processors):
            return raw
        return self._by_length(ahead, lambda ids, last: self.processors(ids, raw if last else raw.clone()), raw)

    def _by_length(self, ahead: int, ask: Any, like: Tensor) -> Tensor:
        """What is answered for the texts [B, n], n being the length of some rows, to which the answer is of use."""
        lengths = sorted(set(self.lengths))
        if len(lengths) == 1:
            answer: Tensor = ask(self._ids[:, : lengths[0] + ahead], True)
            return answer
        found = torch.empty_like(like)
        for n in lengths:
            rows = torch.tensor([i for i, held in enumerate(self.lengths) if held == n], device=self.device)
            found[rows] = ask(self._ids[:, : n + ahead], n == lengths[-1])[rows].to(found.dtype)
        return found

    def _chosen(self, scores: Tensor, ahead: int) -> Tensor:
        if not self.config.do_sample:
            return scores.argmax(-1)
        chances = scores.softmax(-1)
        torch._assert_async(chances.isfinite().all(), "probability tensor contains either `inf`, `nan` or element < 0")
        numbers = [n + ahead - self._prompt for n in self.lengths]
        draws = {number: self._draws.of(number, chances) for number in sorted(set(numbers))}
        of_rows = torch.stack([draws[number][row] for row, number in enumerate(numbers)])
        return (chances / of_rows).argmax(-1)  # as torch.multinomial draws one
