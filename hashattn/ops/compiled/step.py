"""Step: a decode step that is made ready once, of which a call changes a few numbers."""

from __future__ import annotations

from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from hashattn.core.types import MEDIUM
from hashattn.ops.compiled import loops
from hashattn.ops.compiled.threads import share_out
from hashattn.ops.compiled.work import work_for
from hashattn.ops.decode import Inputs, Map, Outputs, Rule, Stored


def compile_for(dtype: torch.dtype) -> None:
    """Compile the loops for keys of a type, or load what was kept of it, so that no step waits for it."""
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)
    codes = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    stored = Stored(q, q, codes, torch.ones(1, dtype=torch.int32))
    like = Inputs(q, codes.unsqueeze(3), stored, torch.zeros(1, dtype=torch.int32), Rule(k=1), 1.0)
    Step(like, 64, (None, None), torch.zeros(1, 1, 8))(q, like.query, (1, 1, 1), 1.0)


class Step:
    """Steps on a cache's memory, as long as it stays where it is.

    Args:
        like: queries and packed queries of the shape and dtype to come, what is stored, each row's first column, and
            the rule. What is stored is contiguous, on the CPU.
        bits: length of a code.
        maps: linear maps of queries and keys that the step encodes by itself, whose keys it is given without codes;
            None where that is done before.
        centre: float32 [B, Hkv, D], subtracted from the keys.
    """

    def __init__(self, like: Inputs, bits: int, maps: tuple[Map | None, Map | None], centre: Tensor) -> None:
        stored, rule = like.stored, like.rule
        norms = stored.norms if like.estimate is None else like.estimate.norms
        (batch, q_heads, tokens, dim), (planes, words) = like.q.shape, like.query.shape[3:]
        kv_heads, room = stored.keys.shape[1:3]
        self.like = like
        self._group = q_heads // kv_heads if rule.shared else 1
        self._choices = batch, kv_heads if rule.shared else q_heads, tokens
        self._bases, self._critical = (torch.zeros(self._choices, dtype=torch.int32) for _ in range(2))
        self._lse, self._held = torch.empty(like.q.shape[:3]), (maps, centre)  # kept alive
        self._word = 0.35e-3 * (q_heads // kv_heads) * planes * words  # microseconds, about, for a key that is scanned
        self._row = 0.3e-3 * dim * like.q.itemsize  # and for one that is read, with its value
        self._units, self._sizes = batch * tokens * kv_heads, (dim, planes * words, bits)
        at = self._at = np.zeros(loops.COUNT, np.int64)
        tensors = {
            loops.KEYS: stored.keys,
            loops.VALUES: stored.values,
            loops.CODES: stored.codes,
            loops.NORMS: norms,
            loops.CENTRE: centre,
            loops.STARTS: like.starts,
            loops.BASES: self._bases,
            loops.CRITICAL: self._critical,
            loops.QUERY_MAP: maps[0].linear if maps[0] is not None else None,
            loops.KEY_MAP: maps[1].linear if maps[1] is not None else None,
        }
        for place, tensor in tensors.items():
            at[place] = 0 if tensor is None else tensor.data_ptr()
        at[loops.BATCH : loops.CODE_ROOM + 1] = batch, q_heads, kv_heads, tokens, dim, room, stored.codes.shape[2]
        at[loops.NORM_ROOM] = 0 if norms is None else norms.shape[2]
        at[loops.WORDS : loops.BITS + 1] = words, planes, bits
        at[loops.K], at[loops.MIN_K] = -1 if rule.k is None else rule.k, rule.min_k
        at[loops.SINKS], at[loops.RECENTS] = rule.sinks, rule.recents
        at[loops.RADIUS], at[loops.SHARED] = -1 if rule.radius is None else rule.radius, rule.shared
        at[loops.BIASED], at[loops.CAUSAL] = rule.biased, like.causal
        at[loops.TIERED], at[loops.ESTIMATED] = rule.critical is not None, like.estimate is not None
        at[loops.WITH_NORMS] = norms is not None
        self._shares = np.zeros(4)
        self._shares[loops.SHARE], self._shares[loops.CRITICAL_SHARE] = rule.share or 0.0, rule.critical or 0.0
        if like.estimate is not None:
            self._shares[loops.A] = like.estimate.a.item()
        self._kind = np.float32(0) if like.q.dtype == torch.float32 else np.uint16(0)

    def __call__(
        self, q: Tensor, query: Tensor | None, columns: tuple[int, int, int], scale: float, need_lse: bool = True
    ) -> Outputs:
        """Search and attend.

        Args:
            q: [B, Hq, T, D]; query: int64 [B, Hq, T, P, W], unless the step encodes it: both contiguous.
            columns: visible keys of the longest row; filled columns; and how many of these have codes.
            need_lse: otherwise lse is what it happens to be.
        """
        longest, length, encoded = columns
        at, slots = self._at, max(1, self.like.rule.slots(longest))
        if query is not None:
            at[loops.QUERY] = query.data_ptr()
        out, ids = torch.empty_like(q), torch.empty((*self._choices, slots), dtype=torch.int32)
        lse = torch.empty(q.shape[:3]) if need_lse else self._lse
        at[loops.Q], at[loops.OUT], at[loops.LSE] = q.data_ptr(), out.data_ptr(), lse.data_ptr()
        at[loops.IDS], at[loops.SLOTS], at[loops.LENGTH], at[loops.ENCODED] = ids.data_ptr(), slots, length, encoded
        self._shares[loops.SCALE] = scale
        threads = torch.get_num_threads()
        if threads == 1:
            self._run(slots, length, 0, self._units)
        else:
            microseconds = self._units * length * self._word + prod(self._choices) * slots * self._row
            share_out(partial(self._run, slots, length), self._units, threads, microseconds)
        if self.like.rule.critical is None:
            return Outputs(out, lse, ids)
        place = torch.arange(slots)
        return Outputs(out, lse, ids, ((place >= self._critical.unsqueeze(-1)) & (ids >= 0)).to(torch.int8) * MEDIUM)

    def _run(self, slots: int, length: int, first: int, last: int) -> None:
        """The KV heads from first to last, in this thread's own memory."""
        work = work_for(self._group, *self._sizes, slots, length)
        loops.step(self._at, self._shares, self._kind, work, first, last)
