"""Simulated decoding: a call of many queries, each of which chooses among its keys as if it were decoded alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import Selection, Step

ENTRIES, FEWEST, MOST = 1 << 19, 16, 256


@dataclass(frozen=True, eq=False)
class QueryBlock:
    """What a block of neighbouring queries did in one layer.

    Attributes:
        tokens: how many queries.
        cache: holds the keys up to the last of them; it grows with the next block.
        keys: that the queries see, summed over rows and queries.
        selection: what they chose; None where all of them were too short-sighted to be searched for.
        weights: softmax weights over it, if the next layer's selector wants them.
        lengths: keys that each query sees, over rows.
    """

    tokens: int
    cache: KVCache
    keys: int
    selection: Selection | None
    weights: Tensor | None
    lengths: tuple[int, ...] = ()

    def step(self, number: int) -> Step:
        """What the same queries are told in the next layer, of this number."""
        return Step(number, self.selection, self.weights)


def block_size(batch: int, keys: int) -> int:
    """Queries of a block, the same in all layers: fewer for more keys, so that memory stays bounded."""
    return max(FEWEST, min(MOST, ENTRIES // max(1, batch * keys)))


def visible_lengths(keys: int, tokens: int, starts: Sequence[int]) -> tuple[int, ...]:
    """Keys that each of the last `tokens` of `keys` columns sees, over rows."""
    return tuple(max(0, end - first) for first in starts for end in range(keys - tokens + 1, keys + 1))


@dataclass(frozen=True)
class Simulation:
    """A layer whose queries attend to what each would choose if the tokens came one by one.

    Keys go block by block into a cache of the composition, and the block's queries attend to it: within a block each
    query sees the keys up to its own. Nothing is kept when the call ends.

    Attributes:
        attn: the composition bound to the layer.
        number: of the layer.
        starts: first column of each row (left padding).
        scale: of the logits.
    """

    attn: HashAttention
    number: int
    starts: Sequence[int]
    scale: float | None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, previous: Sequence[QueryBlock | None]
    ) -> tuple[Tensor, list[QueryBlock]]:
        """Attend with queries [B, Hq, T, D], of the last T of the N columns, to keys and values [B, Hkv, N, D].

        Args:
            previous: the blocks of the layer before in the same pass, () or None where it ran dense.

        Returns:
            [B, Hq, T, D], zero for queries in the padding, and the blocks.
        """
        attn, selector = self.attn.searching(query.device), self.attn.selector
        batch, tokens, keys = query.shape[0], query.shape[2], key.shape[2]
        size, wants = block_size(batch, keys), selector is not None and selector.needs_weights
        cache = attn.new_cache(batch, key.shape[1], key.shape[3], capacity=keys)
        outs, blocks = [], []
        for i, first in enumerate(range(0, tokens, size)):
            part = query[:, :, first : first + size]
            end = keys - tokens + first + part.shape[2]
            cache.append(key[:, :, len(cache) : end], value[:, :, len(cache) : end])
            begun = [min(start, end) for start in self.starts]  # rows that are padding so far see nothing
            if begun != cache._starts:
                cache.set_start(torch.tensor(begun))
            before = previous[i] if i < len(previous) else None
            step = before.step(self.number) if before is not None else Step(self.number)
            output, selection = attn.run(part, cache, scale=self.scale, step=step, need_weights=wants)
            if selector is not None and selector.accumulates and not selector.one_by_one:
                attn.accumulate(part, cache, scale=self.scale, step=step)  # the next block's prompt ends here
            outs.append(output.out)
            lengths = visible_lengths(end, part.shape[2], self.starts)
            weights = output.weights if selection is not None else None
            blocks.append(QueryBlock(part.shape[2], cache, sum(lengths), selection, weights, lengths))
        return torch.cat(outs, 2), blocks
