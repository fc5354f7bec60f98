"""Decoding: passes of one generate(), each a draft by search and a check by full attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hashattn.integrations.attached.clock import clock_of
from hashattn.integrations.attached.draft_length import DraftLength
from hashattn.integrations.attached.drafts import DraftCounts
from hashattn.integrations.transformers.lossless.calls import Calls
from hashattn.integrations.transformers.lossless.draft import UNKNOWN, Draft
from hashattn.integrations.transformers.lossless.writer import Writer


class Decoding:
    """Writes a text. After each pass, and after an error, its cache is as full attention alone would have left it.

    Args:
        most: tokens of a draft.
    """

    def __init__(self, writer: Writer, calls: Calls, counts: DraftCounts, most: int) -> None:
        self._writer, self._calls, self._counts = writer, calls, counts
        self._length, self._clock = DraftLength(most), clock_of(writer.ids.device)
        self._none = self._known = writer.ids[:, :0]

    def run(self) -> Any:
        """Write all of it; returns what generate() does."""
        writer, calls = self._writer, self._calls
        try:
            outputs = calls.prefill(writer.ids, writer.config)
            writer.write(outputs.logits[:, -1], outputs.get("hidden_states"))
            writer.done = not writer.unfinished.any()
            while not writer.done:
                self._pass()
        finally:
            calls.end()
        return writer.result(calls.cache)

    def _pass(self) -> None:
        """Draft, check, and write what full attention chooses up to the first token that was not drafted."""
        writer, clock = self._writer, self._clock
        begun, before = clock.mark(), writer.ids.shape[1]
        draft = self._draft(self._length.next(writer.room - 1))
        drafted = clock.mark()
        outputs = self._calls.check(torch.cat([writer.ids, draft.tokens], -1), len(draft))
        used = accepted = 0  # columns of the check that belong to the text, and drafted tokens
        agree: list[bool] = []
        try:
            for position in range(len(draft) + 1):
                used += 1
                agree = self._write(outputs, draft, position)
                if not all(agree):
                    break
                accepted += position < len(draft)
                if writer.done:
                    break
            written, rejected = writer.ids.shape[1] - before, not all(agree)
            self._known = self._none
            if rejected and any(agree) and not writer.done:
                self._known = draft.ahead(writer, outputs.logits, written, self._mask(agree))
        finally:
            self._calls.take_back(len(draft) + 1 - used)
        self._calls.wrote(written)
        checked = clock.mark()
        drafting, checking = clock.seconds(begun, drafted), clock.seconds(drafted, checked)
        self._length.saw(len(draft), accepted, rejected, drafting, checking)
        self._counts.saw(len(draft), written, drafting, checking)

    def _draft(self, length: int) -> Draft:
        """Draft so many tokens; the cache then holds none of them."""
        draft, calls, steps = Draft.begin(self._writer, self._known), self._calls, 0

        def step(ids: Tensor) -> Tensor:
            nonlocal steps
            logits = calls.search(ids, ids.shape[1] - self._writer.ids.shape[1])
            steps += 1
            return logits

        try:
            draft.extend(self._writer, length, step)
        finally:
            if steps:
                calls.take_back(steps)
        return draft

    def _write(self, outputs: Any, draft: Draft, position: int) -> list[bool]:
        """Write the token at a position of the check; returns the rows that had drafted it: all, where none was."""
        writer, going = self._writer, self._writer.unfinished
        states = outputs.get("hidden_states")
        hidden = None if states is None else tuple(x[:, position : position + 1] for x in states)
        tokens = writer.write(outputs.logits[:, position], hidden)
        if position == len(draft):
            writer.done = not writer.unfinished.any()
            return [True] * len(tokens)
        looked_at = going
        if position < draft.known.shape[1]:
            looked_at = going & (draft.known[:, position] == UNKNOWN)
        agree = tokens == draft.tokens[:, position]
        rows = torch.stack([agree, writer.unfinished, looked_at, looked_at & agree]).tolist()  # waits for the device
        writer.done = not any(rows[1])
        self._counts.look(position, sum(rows[2]), sum(rows[3]))
        return list(map(bool, rows[0]))

    def _mask(self, rows: list[bool]) -> Tensor:
        return torch.tensor(rows, device=self._writer.ids.device)
