"""Step: a decode step that is made ready once, of which a call changes a few numbers."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hashattn.ops.compiled import loops
from hashattn.ops.compiled import places as p
from hashattn.ops.compiled.threads import share_out
from hashattn.ops.compiled.work import layer_for, work_for
from hashattn.ops.decode import Inputs, Map, Rule, Stored


def compile_for(dtype: torch.dtype) -> None:
    """Compile the loops for keys of a type, or load what was kept of it, so that no step waits for it."""
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)
    codes = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    stored = Stored(q, q, codes, torch.ones(1, dtype=torch.int32))
    like = Inputs(q, codes.unsqueeze(3), stored, torch.zeros(1, dtype=torch.int32), Rule(k=1), 1.0)
    Step(like, 64, (None, None), torch.zeros(1, 1, 8))(q, like.query, (1, 1, 1), 1.0)


class Found(NamedTuple):
    """What a step gives: as decode.Outputs says, critical keys before medium ones, where the rule has tiers.

    Attributes:
        weights: float32 [B, Hq, T, slots], of the softmax, zero in empty slots; None unless they are asked for.
    """

    out: Tensor
    lse: Tensor
    ids: Tensor
    tier: Tensor | None
    weights: Tensor | None


class Step:
    """Steps on a cache's memory, as long as it stays where it is.

    Args:
        like: queries and packed queries of the shape and dtype to come, what is stored, each row's first column, and
            the rule. What is stored is contiguous, on the CPU.
        bits: length of a code.
        maps: of queries and of keys that the step encodes by itself, whose keys it is given without codes; None where
            that is done before. That of keys is linear.
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
        self._bases = torch.zeros(self._choices, dtype=torch.int32)
        self._query = torch.empty(like.query.shape if maps[0] is not None else 0, dtype=torch.int64)
        self._lse, self._held = torch.empty(like.q.shape[:3]), (maps, centre)  # kept alive
        self._word = 0.35e-3 * (q_heads // kv_heads) * planes * words  # microseconds, about, for a key that is scanned
        self._row = 0.3e-3 * dim * like.q.itemsize  # and for one that is read, with its value
        self._rows, self._heads = batch * tokens, kv_heads
        widest = max(dim, bits, *(maps[0].widths if maps[0] is not None else ()))
        residual = None if like.estimate is None else like.estimate.residual
        self._sizes = dim, planes * words, bits, widest, 0 if residual is None else len(residual.out)
        at = self._at = np.zeros(p.COUNT, np.int64)
        tensors = {
            p.KEYS: stored.keys,
            p.VALUES: stored.values,
            p.CODES: stored.codes,
            p.NORMS: norms,
            p.CENTRE: centre,
            p.STARTS: like.starts,
            p.BASES: self._bases,
            p.QUERY: self._query,
            p.QUERY_MAP: maps[0].linear if maps[0] is not None else None,
            p.KEY_MAP: maps[1].linear if maps[1] is not None else None,
        }
        for place, tensor in tensors.items():
            at[place] = 0 if tensor is None else tensor.data_ptr()
        if maps[0] is not None:
            at[p.UNIT], at[p.LAYERS] = maps[0].unit, len(maps[0].weights)
            for i, (weight, bias) in enumerate(zip(maps[0].weights, maps[0].biases, strict=True)):
                own = p.LAYER + 3 * i
                at[own : own + 3] = weight.data_ptr(), bias.data_ptr(), len(bias)
        if residual is not None:
            if residual.query.shape[1] != bits or residual.key.shape[1] != bits:
                widths = [*residual.query.shape], [*residual.key.shape]
                raise ValueError(f"the residual of estimates must be of codes of {bits} bits, got weights {widths}")
            weights = (residual.query, residual.bias, residual.key, residual.out, residual.out_bias)
            at[p.RESIDUAL : p.RESIDUAL + 5] = [x.data_ptr() for x in weights]
            at[p.HIDDEN] = len(residual.out)
        at[p.BATCH : p.CODE_ROOM + 1] = batch, q_heads, kv_heads, tokens, dim, room, stored.codes.shape[2]
        at[p.NORM_ROOM] = 0 if norms is None else norms.shape[2]
        at[p.WORDS : p.BITS + 1] = words, planes, bits
        at[p.K], at[p.MIN_K] = -1 if rule.k is None else rule.k, rule.min_k
        at[p.SINKS], at[p.RECENTS] = rule.sinks, rule.recents
        at[p.RADIUS], at[p.SHARED] = -1 if rule.radius is None else rule.radius, rule.shared
        at[p.BIASED], at[p.CAUSAL] = rule.biased, like.causal
        at[p.TIERED], at[p.ESTIMATED] = rule.critical is not None, like.estimate is not None
        at[p.WITH_NORMS] = norms is not None
        if rule.vote_share is not None:
            at[p.VOTES] = -(-rule.votes(q_heads) // self._group)
            at[p.VOTE] = self._group * rule.vote_discount
        self._shares = np.zeros(5)
        self._shares[p.SHARE], self._shares[p.CRITICAL_SHARE] = rule.share or 0.0, rule.critical or 0.0
        self._shares[p.RATIO] = rule.prior_ratio or 0.0
        self._kind = np.float32(0) if like.q.dtype == torch.float32 else np.uint16(0)

    def __call__(
        self,
        q: Tensor,
        query: Tensor | None,
        columns: tuple[int, int, int],
        scale: float,
        need_lse: bool = True,
        need_weights: bool = False,
        before: tuple[Tensor, Tensor | None] | None = None,
    ) -> Found:
        """Search and attend.

        Args:
            q: [B, Hq, T, D]; query: int64 [B, Hq, T, P, W], unless the step encodes it: both contiguous.
            columns: visible keys of the longest row; filled columns; and how many of these have codes.
            need_lse: otherwise lse is what it happens to be.
            need_weights: of the softmax.
            before: what the layer before kept in the same step, of which the rule's prior is: ids int32 [B, H, T, K],
                -1 in empty slots, and their softmax weights, float32 [B, Hq, T, K]. None if it ran dense.
        """
        rule, (longest, length, encoded) = self.like.rule, columns
        at, slots = self._at, max(1, rule.slots(longest))
        if query is not None:
            at[p.QUERY] = query.data_ptr()
        out, ids = torch.empty_like(q), torch.empty((*self._choices, slots), dtype=torch.int32)
        lse = torch.empty(q.shape[:3]) if need_lse else self._lse
        tier = torch.empty(ids.shape, dtype=torch.int8) if rule.critical is not None else None
        weights = torch.empty((*q.shape[:3], slots)) if need_weights else None
        at[p.Q], at[p.OUT], at[p.LSE] = q.data_ptr(), out.data_ptr(), lse.data_ptr()
        at[p.IDS], at[p.SLOTS], at[p.LENGTH], at[p.ENCODED] = ids.data_ptr(), slots, length, encoded
        at[p.TIERS] = 0 if tier is None else tier.data_ptr()
        at[p.WEIGHTS] = 0 if weights is None else weights.data_ptr()
        self._shares[p.SCALE] = scale
        if self.like.estimate is not None:
            self._shares[p.A] = self.like.estimate.a.item()
        held = self._follow(before)  # alive until the step has run
        if at[p.VOTE] or at[p.PRIOR]:
            self._calibrated(slots, length)
        else:
            self._uncalibrated(slots, length)
        del held
        return Found(out, lse, ids, tier, weights)

    def _follow(self, before: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, ...]:
        """Let the rule's prior be what the layer before kept, if it has one."""
        at, rule = self._at, self.like.rule
        at[p.PRIOR] = 0
        if before is None or before[1] is None or not rule.prior_discount:
            return ()
        ids, weights = before[0].contiguous(), before[1].detach().float().contiguous()
        (batch, heads, tokens, slots), (_, given, asked, _) = ids.shape, weights.shape
        if (batch, tokens) != self.like.q.shape[::2] or weights.shape != (batch, given, asked, slots) or given % heads:
            raise ValueError(
                f"what the layer before kept must be of {[*self.like.q.shape[::2]]} rows and queries, and its weights "
                f"of the same slots, got ids {[*ids.shape]} and weights {[*weights.shape]}"
            )
        at[p.BEFORE], at[p.BEFORE_WEIGHTS], at[p.PRIOR] = ids.data_ptr(), weights.data_ptr(), rule.prior_discount
        at[p.PRIOR] *= self._group
        at[p.BEFORE_HEADS], at[p.BEFORE_GROUP], at[p.BEFORE_SLOTS] = heads, given // heads, slots
        return ids, weights

    def _uncalibrated(self, slots: int, length: int) -> None:
        """Every KV head for itself."""
        units, threads, run = self._rows * self._heads, torch.get_num_threads(), partial(self._run, slots, length)
        if threads == 1:
            run(p.QUERIES | p.NEWEST | p.ATTEND, 0, units)
            return
        if self._at[p.QUERY_MAP]:
            run(p.QUERIES, 0, units)
        share_out(partial(run, p.NEWEST | p.ATTEND), units, threads, self._microseconds(slots, length))

    def _calibrated(self, slots: int, length: int) -> None:
        """The heads of a query one with the other: all raw distances come first, which its heads' votes need."""
        rows, heads, threads = self._rows, self._heads, torch.get_num_threads()
        run, first = partial(self._run, slots, length), p.NEWEST | (p.RANK if self._at[p.VOTE] else 0)
        if threads == 1:
            run(p.QUERIES | first | p.TALLY | p.ATTEND, 0, rows * heads)
            return
        microseconds = self._microseconds(slots, length)
        if self._at[p.QUERY_MAP]:
            run(p.QUERIES, 0, rows * heads)
        if rows >= threads:
            every = first | p.TALLY | p.ATTEND
            share_out(lambda low, high: run(every, low * heads, high * heads), rows, threads, microseconds)
            return
        layer = layer_for(self._choices[1], length)
        for low in range(0, rows * heads, heads):

            def together(what: int, first: int, last: int, low: int = low) -> None:
                run(what, low + first, low + last, layer)

            share_out(partial(together, first), heads, threads, microseconds / rows)
            together(p.TALLY, 0, heads)
            share_out(partial(together, p.ATTEND), heads, threads, microseconds / rows)

    def _microseconds(self, slots: int, length: int) -> float:
        """That a step takes on one thread, about."""
        return self._rows * self._heads * length * self._word + prod(self._choices) * slots * self._row

    def _run(self, slots: int, length: int, what: int, first: int, last: int, layer: p.Layer | None = None) -> None:
        """What is asked for, of the KV heads from first to last, in this thread's own memory."""
        work = work_for(self._group, *self._sizes, slots, length)
        if layer is None:
            layer = layer_for(self._choices[1], length) if what & p.TALLY else layer_for(0, 0)
        loops.step(self._at, self._shares, self._kind, work, layer, what, first, last)
