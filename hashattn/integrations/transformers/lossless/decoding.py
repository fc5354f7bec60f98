"""Decoding: passes of one generate(), each a draft by search and a check by full attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.integrations.attached.clock import clock_of
from hashattn.integrations.attached.draft_length import DraftLength
from hashattn.integrations.attached.drafts import DraftCounts
from hashattn.integrations.transformers.lossless.calls import Calls
from hashattn.integrations.transformers.lossless.draft import Draft
from hashattn.integrations.transformers.lossless.writer import Writer


@dataclass
class Verdict:
    """What a check has found, of each row.

    Attributes:
        kept: columns of the check that belong to the text.
        accepted: drafted tokens.
        rejected: whether the token behind these was not.
        ended: whether the row has.
    """

    kept: list[int]
    accepted: list[int]
    rejected: list[bool]
    ended: list[bool]

    @classmethod
    def none(cls, batch: int) -> Verdict:
        """Before anything is found."""
        return cls([0] * batch, [0] * batch, [False] * batch, [False] * batch)


class Decoding:
    """Writes a text. In the end, and after an error, its cache is as full attention alone would have left it.

    Args:
        most: tokens of a draft.
    """

    def __init__(self, writer: Writer, calls: Calls, counts: DraftCounts, most: int) -> None:
        self._writer, self._calls, self._counts, self._most = writer, calls, counts, most
        self._length, self._clock = DraftLength(most), clock_of(writer.device)

    def run(self) -> Any:
        """Write all of it; returns what generate() does."""
        writer, calls = self._writer, self._calls
        try:
            outputs = calls.prefill(writer.text(0), writer.config)
            batch = len(writer.lengths)
            _, ended = writer.write(outputs.logits[:, -1], 0, [True] * batch, outputs.get("hidden_states"))
            writer.advance([1] * batch, ended.tolist())
            if writer.why_together() is None:
                calls.apart(batch)
            while not writer.done:
                self._pass()
            self._catch_up()
        finally:
            calls.end()
            writer.end()
        return writer.result(calls.cache)

    def _pass(self) -> None:
        """Draft, check, and write what full attention chooses up to each row's first token that was not drafted."""
        writer, clock = self._writer, self._clock
        begun, going = clock.mark(), [*writer.unfinished]
        draft = self._draft(self._length.next(writer.room - 1))
        drafted = clock.mark()
        outputs = self._calls.check(writer, len(draft))
        found = Verdict.none(len(going))
        try:
            if self._calls.rows is None:
                self._judge_together(found, outputs, len(draft))
            else:
                self._judge_apart(found, outputs, len(draft))
                self._follow(found.kept, going, len(draft) + 1)
        finally:
            self._calls.keep(found.kept, len(draft) + 1)
        writer.advance(found.kept, found.ended)
        self._calls.wrote(min(found.kept))
        checked = clock.mark()
        drafting, checking = clock.seconds(begun, drafted), clock.seconds(drafted, checked)
        rows = [i for i, more in enumerate(going) if more]
        seen = [(found.accepted[i], found.rejected[i]) for i in rows]
        self._length.saw(len(draft), seen if self._calls.rows is not None else [min(seen)], drafting, checking)
        self._counts.saw(len(draft), [found.kept[i] for i in rows], drafting, checking)

    def _draft(self, length: int) -> Draft:
        """Draft so many tokens; the cache then holds none of them."""
        draft, calls, steps = Draft(), self._calls, 0

        def step(drafted: int) -> Tensor:
            nonlocal steps
            logits = calls.search(self._writer, drafted)
            steps += 1
            return logits

        try:
            draft.extend(self._writer, length, step)
        finally:
            if steps:
                calls.take_back(steps)
        return draft

    def _judge_together(self, found: Verdict, outputs: Any, drafted: int) -> None:
        """All rows go on to the first token that one of them had not drafted."""
        rows = [True] * len(found.kept)
        for position in range(drafted + 1):
            found.kept = [position + 1] * len(rows)
            agree, ended = self._write(outputs, position, drafted, rows)
            found.ended = [a or b for a, b in zip(found.ended, ended, strict=True)]
            if position < drafted:
                right = all(agree)
                found.accepted, found.rejected = [position + right] * len(rows), [not right] * len(rows)
            over = all(not more or now for more, now in zip(self._writer.unfinished, found.ended, strict=True))
            if over or not all(agree):
                return

    def _judge_apart(self, found: Verdict, outputs: Any, drafted: int) -> None:
        """Each row goes on to its first token that was not drafted."""
        going = [*self._writer.unfinished]
        for position in range(drafted + 1):
            found.kept = [n + more for n, more in zip(found.kept, going, strict=True)]
            agree, ended = self._write(outputs, position, drafted, going)
            for row in [i for i, more in enumerate(going) if more]:
                found.ended[row] = ended[row]
                if position < drafted:
                    found.accepted[row], found.rejected[row] = position + agree[row], not agree[row]
                going[row] = agree[row] and not ended[row]
            if not any(going):
                return

    def _follow(self, kept: list[int], going: list[bool], most: int) -> None:
        """Let rows that have ended take padding up to the longest that has not."""
        lengths = self._writer.lengths
        longest = max(lengths[i] + kept[i] for i, more in enumerate(going) if more)
        for row, more in enumerate(going):
            if not more:
                kept[row] = min(most, max(0, longest - lengths[row]))

    def _catch_up(self) -> None:
        """Let all rows take padding up to the longest, so that the cache holds what it would."""
        writer, calls = self._writer, self._calls
        while calls.rows is not None and (behind := max(writer.lengths) - min(writer.lengths)):
            count = min(behind, self._most + 1)
            kept = [min(count, max(writer.lengths) - n) for n in writer.lengths]
            calls.check(writer, count - 1)
            calls.keep(kept, count)
            writer.advance(kept, [True] * len(kept))

    def _write(self, outputs: Any, position: int, drafted: int, rows: list[bool]) -> tuple[list[bool], list[bool]]:
        """Write tokens of these rows at a position of the check; returns who had drafted them, and who has ended."""
        writer = self._writer
        states = outputs.get("hidden_states")
        hidden = None if states is None else tuple(x[:, position : position + 1] for x in states)
        guessed = writer.tokens(position + 1, 1)[:, 0] if position < drafted else None
        tokens, ended = writer.write(outputs.logits[:, position], position, rows, hidden)
        agree = tokens == guessed if guessed is not None else torch.ones_like(ended)
        both: list[list[bool]] = torch.stack([agree, ended]).tolist()  # waits for the device
        if guessed is not None:
            looked_at = [a for a, on, more in zip(both[0], rows, writer.unfinished, strict=True) if on and more]
            self._counts.look(position, len(looked_at), sum(looked_at))
        return both[0], both[1]
