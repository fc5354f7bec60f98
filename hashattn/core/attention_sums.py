"""AttentionSums: what past queries say of each key, and how a crop takes it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.core.buffer import TokenBuffer
from hashattn.core.latest_queries import LatestQueries
from hashattn.core.types import Table

DROPPED = float("-inf")
NEVER = torch.iinfo(torch.int32).max  # instead of the column whose query left a key out
UNDO = 256  # a crop can take back the sums of so many queries at least
MARKS = 16
_ENTRIES = 1 << 22  # of a matrix of attention weights at a time


@dataclass(frozen=True, eq=False)
class Attended:
    """A call, as a selector that looks back is shown it.

    Attributes:
        attention_sums: the cache's.
        q: [B, Hq, T, D], of its last T columns.
        keys: [B, Hkv, N, D].
        spans: [B][T], (first, end): the columns that each query sees.
        scale: of the logits.
        layer: number of the layer.
    """

    attention_sums: AttentionSums
    q: Tensor
    keys: Tensor
    spans: Table
    scale: float
    layer: int

    def part(self, first: int, last: int) -> Attended:
        """The same of the queries first to last alone, with the columns up to theirs."""
        cut, keys = self.q.shape[2] - last, self.keys.shape[2]
        spans = [row[first:last] for row in self.spans]
        return Attended(
            self.attention_sums, self.q[:, :, first:last], self.keys[:, :, : keys - cut], spans, self.scale, self.layer
        )

    @property
    def seen(self) -> Tensor | None:
        """The spans as a mask, bool [B, 1, T, N]; None if every query sees every column."""
        keys = self.keys.shape[2]
        if all(span == (0, keys) for row in self.spans for span in row):
            return None
        visible, columns = torch.tensor(self.spans, device=self.q.device), torch.arange(keys, device=self.q.device)
        return ((columns >= visible[..., :1]) & (columns < visible[..., 1:])).unsqueeze(1)


@dataclass
class Prompt:
    """Neighbouring columns that came in dense calls, and what was chosen at their end.

    Attributes:
        begin, end: its columns.
        most: at most this many keys of a head were kept; None where nothing has been chosen yet.
    """

    begin: int
    end: int
    most: int | None = None


class AttentionSums:
    """One number a key and KV head, and which keys were left out, by the query of which column: a KVCache owns it.

    Whoever adds says so by column, so that a crop undoes what the cropped queries did: keys that they left out come
    back, and what they gave is taken back. For that the latest queries are kept, and the sums at some columns.

    Attributes:
        queries: the latest ones.
        prompts: ascending.
        marks: (column, sums before its query), ascending.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._sums, self._left_out = TokenBuffer(capacity), TokenBuffer(capacity)
        self.queries = LatestQueries()
        self.prompts: list[Prompt] = []
        self.marks: list[tuple[int, Tensor]] = []
        self._scale = 1.0

    def __len__(self) -> int:
        """Keys that have a sum: later ones are new."""
        return self._sums.length

    @property
    def nbytes(self) -> int:
        marks = sum(sums.numel() * sums.element_size() for _, sums in self.marks)
        return self._sums.nbytes + self._left_out.nbytes + self.queries.nbytes + marks

    def of(self, keys: int, like: Tensor) -> Tensor:
        """float32 [B, Hkv, keys] where `like` [B, Hkv, ...] is: zero for new keys, DROPPED for those left out."""
        return self.sums(keys, like).masked_fill(self.left_out(keys, like) != NEVER, DROPPED)

    def sums(self, keys: int, like: Tensor) -> Tensor:
        """The sums alone, float32 [B, Hkv, keys]."""
        return self._padded(self._sums, keys, torch.zeros(*like.shape[:2], keys, device=like.device))

    def left_out(self, keys: int, like: Tensor) -> Tensor:
        """The column whose query left a key out, int32 [B, Hkv, keys]; NEVER for those that are there."""
        full = torch.full((*like.shape[:2], keys), NEVER, dtype=torch.int32, device=like.device)
        return self._padded(self._left_out, keys, full)

    def set(self, sums: Tensor, left_out: Tensor) -> None:
        """Replace both by [B, Hkv, N]."""
        for buffer, new in ((self._sums, sums.float()), (self._left_out, left_out)):
            buffer.truncate(0)
            buffer.append(new.unsqueeze(-1))

    def most(self, keys: int) -> int | None:
        """At most this many of a head's `keys` keys are kept; None if nobody has counted."""
        chosen = [prompt for prompt in self.prompts if prompt.most is not None]
        return (chosen[-1].most or 0) + keys - chosen[-1].end if chosen else None

    # ---- those who add

    def add(self, shown: Attended, sums: Tensor, kept: Tensor | None) -> None:
        """Add what a call's queries gave, float32 [B, Hkv, N]; kept bool [B, Hkv, N] leaves the other keys out.

        kept goes with a single query, and says also what it attended to.
        """
        queries, tokens, keys = self.queries, shown.q.shape[2], sums.shape[-1]
        first, held = keys - tokens, self.sums(keys, sums)
        if not self.marks or self._marks_again(first, kept is not None):
            self.marks = [*self.marks, (first, held[..., : min(first, len(self))].clone())][-MARKS:]
        self._hear(shown, narrow=kept is not None)
        deep = [column for column, _ in self.marks if queries.since(column) >= UNDO]
        if deep:
            queries.forget(deep[-1])
        left_out = self.left_out(keys, sums)
        if kept is not None:
            left_out = torch.where(kept | (left_out != NEVER), left_out, first)
        self.set(held + sums, left_out)

    def _marks_again(self, column: int, narrow: bool) -> bool:
        queries, last = self.queries, self.marks[-1][0]
        turned = bool(queries.narrow) and queries.narrow[-1] != narrow
        return last != column and (not narrow or turned or queries.since(last) >= UNDO)

    # ---- those who choose at the end of a prompt

    def extend(self, shown: Attended, window: int) -> None:
        """Add a call's columns to the prompt that they go on with, or begin one, whose last `window` queries choose."""
        tokens, keys, keep = shown.q.shape[2], shown.keys.shape[2], window + UNDO
        if self.prompts and self.prompts[-1].end == keys - tokens:
            self.reopen(keys)
        else:
            self.prompts.append(Prompt(keys - tokens, keys))
        self._hear(shown.part(max(0, tokens - keep), tokens), narrow=False)
        self.queries.wanted = window
        if tokens > keep or len(self.queries) > 2 * keep:
            self.queries.forget(self.queries.at[-keep])

    def reopen(self, end: int) -> None:
        """Let the last prompt end elsewhere: what was chosen at its end is undone."""
        prompt = self.prompts[-1]
        prompt.end, prompt.most = end, None
        self._restore(prompt.begin)

    def choose(self, kept: Tensor, most: int) -> None:
        """Of the keys up to the end of the last prompt, leave out those not in kept, bool [B, Hkv, end]."""
        prompt = self.prompts[-1]
        left_out = self.left_out(prompt.end, kept)
        left_out = torch.where(kept | (left_out != NEVER), left_out, prompt.end - 1)
        self.set(self.sums(prompt.end, kept), left_out)
        prompt.most = most

    def window(self, count: int) -> tuple[Tensor, list[int]]:
        """The last queries of the last prompt, [B, Hq, count, D], and the columns that they saw."""
        return self.queries.within(self.prompts[-1].end - count, self.prompts[-1].end)[:2]

    @property
    def scale(self) -> float:
        """Of the logits of the queries that are kept."""
        return self._scale

    # ---- following the cache

    def why_not_crop(self, length: int) -> str | None:
        """Why the cache cannot be cropped to its first `length` columns, as the end of a sentence; None if it can."""
        known = self.queries.known
        if self.marks and 0 < length < len(self):
            column = max((column for column, _ in self.marks if column <= length), default=length)
            if column < min(known, length):
                return (
                    f"votes of queries before column {known} cannot be taken back, but for those at columns "
                    f"{[column for column, _ in self.marks]}: what is to be kept should be a call of its own"
                )
        cut = next((prompt for prompt in self.prompts if prompt.begin < length < prompt.end), None)
        if cut is not None and known > max(cut.begin, length - self.queries.wanted):
            return (
                f"the queries before column {known}, the last {self.queries.wanted} of which would choose keys, are "
                "forgotten: what is to be kept should be a call of its own"
            )
        return None

    def crop(self, length: int, keys: Tensor | None, starts: Sequence[int]) -> None:
        """Be what one would be had the queries from column `length` on never come; see :meth:`why_not_crop`.

        Args:
            keys: of the cache, [B, Hkv, at least length, D]; None of an empty one.
            starts: first column of each row.
        """
        if length >= max(len(self), self.queries.end):
            return
        self.queries.truncate(length)
        self.prompts = [prompt for prompt in self.prompts if prompt.begin < length]
        if self.prompts and self.prompts[-1].end > length:
            self.reopen(length)
        self._restore(length)
        kept = [(column, sums) for column, sums in self.marks if column <= length]
        if kept and length < len(self):
            assert keys is not None
            column, before = kept[-1]
            end = self.queries.end if self.queries.since(column) else before.shape[-1]
            sums = torch.zeros(*keys.shape[:2], end, device=keys.device)
            sums[..., : before.shape[-1]] = before
            self.set(sums + self._since(column, keys[:, :, :end], starts), self.left_out(end, sums))
        for buffer in (self._sums, self._left_out):
            buffer.truncate(length if kept or not self.marks else 0)
        self.marks = kept

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        for buffer in (self._sums, self._left_out):
            buffer.select(rows)
        self.queries.select(rows)
        self.marks = [(column, sums.index_select(0, rows)) for column, sums in self.marks]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as contiguous tensors and plain numbers by names that begin with "votes"."""
        state: dict[str, Any] = {}
        if len(self):
            like = self._sums.storage
            state = {"votes": self.sums(len(self), like), "votes_left_out": self.left_out(len(self), like)}
        if self.marks:
            widths = [sums.shape[-1] for _, sums in self.marks]
            state["votes_marks"] = torch.tensor([[column for column, _ in self.marks], widths])
            state["votes_at_marks"] = torch.cat([sums for _, sums in self.marks], -1)
        if self.prompts:
            rows = [[p.begin, p.end, -1 if p.most is None else p.most] for p in self.prompts]
            state["votes_prompts"] = torch.tensor(rows)
        if not self.queries.empty:
            state |= self.queries.state_dict() | {"votes_scale": self._scale}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be what a state_dict tells, while still empty; what else is in it is not looked at."""
        if "votes" in state:
            self.set(state["votes"], state["votes_left_out"])
        if "votes_marks" in state:
            columns, widths = state["votes_marks"].tolist()
            self.marks = list(zip(columns, state["votes_at_marks"].split(widths, -1), strict=True))
        if "votes_prompts" in state:
            rows = state["votes_prompts"].tolist()
            self.prompts = [Prompt(begin, end, None if most < 0 else most) for begin, end, most in rows]
        if "votes_queries" in state:
            self.queries.load_state_dict(state)
            self._scale = state["votes_scale"]

    # ---- inside

    def _hear(self, shown: Attended, narrow: bool) -> None:
        ends = [max(row[t][1] for row in shown.spans) for t in range(shown.q.shape[2])]
        self.queries.append(shown.q, shown.keys.shape[2], ends, narrow)
        self._scale = shown.scale

    def _restore(self, column: int) -> None:
        """Let the keys come back that queries from this column on left out."""
        if self._left_out.length:
            held = self._left_out.view
            restored = held.masked_fill(held >= column, NEVER)
            self._left_out.truncate(0)
            self._left_out.append(restored)

    def _since(self, column: int, keys: Tensor, starts: Sequence[int]) -> Tensor:
        """The sums of the queries from this column on, as they were."""
        q, ends, at, narrow = self.queries.within(column, keys.shape[2])
        if not at:
            return torch.zeros(*keys.shape[:3], device=keys.device)
        columns = torch.arange(keys.shape[2], device=keys.device)
        first = torch.tensor(list(starts), device=keys.device)[:, None, None]
        end = torch.tensor(ends, device=keys.device)[:, None]
        seen = ((columns >= first) & (columns < end)).unsqueeze(1)  # [B, 1, n, N]
        left_out = self.left_out(keys.shape[2], keys).unsqueeze(2)
        alone = torch.tensor(narrow, device=keys.device)[:, None]
        attended = ~alone | (left_out > torch.tensor(at, device=keys.device)[:, None])  # [B, Hkv, n, N]
        return dense_sums(q, keys, seen & attended, self._scale)

    @staticmethod
    def _padded(buffer: TokenBuffer, keys: int, full: Tensor) -> Tensor:
        held = min(keys, buffer.length)
        if held:
            full[..., :held] = buffer.view[:, :, :held, 0]
        return full


@torch.no_grad()
def dense_sums(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Full attention's weights, summed over queries and the heads of a group: float32 [B, Hkv, N].

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, N, D].
        seen: bool [B, 1 or Hkv, T, N], which keys each query sees; None for all.
    """
    sums = torch.zeros(*k.shape[:3], device=k.device)
    block = max(1, _ENTRIES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], block):
        part = q[:, :, first : first + block].float()
        logits = (part.unflatten(1, (k.shape[1], -1)) @ k.float().unsqueeze(2).transpose(-1, -2)) * scale
        if seen is not None:
            logits = logits.masked_fill(~seen[:, :, first : first + block].unsqueeze(2), -torch.inf)
        sums += torch.softmax(logits, -1).nan_to_num(0.0).sum((2, 3))
    return sums


@torch.no_grad()
def selected_sums(ids: Tensor, weights: Tensor, keys: int) -> Tensor:
    """Weights [B, Hq, T, K] over the slots of ids [B, Hkv, T, K], summed likewise: float32 [B, Hkv, N]."""
    grouped = weights.unflatten(1, (ids.shape[1], -1)).sum(2).flatten(2)  # [B, Hkv, T*K]
    columns = torch.where(ids < 0, keys, ids).long().flatten(2)
    sums = torch.zeros(*ids.shape[:2], keys + 1, device=ids.device)
    return sums.scatter_add_(-1, columns, grouped.float().nan_to_num(0.0))[..., :keys]  # a broken query has no vote
