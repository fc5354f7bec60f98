"""Simulated decoding: a call of many queries, each of which chooses among its keys as if it were decoded alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import Selection, Step

if TYPE_CHECKING:
    from hashattn.integrations.transformers.forward import Call, Forward

ENTRIES, FEWEST, MOST = 1 << 19, 16, 256


@dataclass(frozen=True, eq=False)
class Block:
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


def block_size(batch: int, keys: int) -> int:
    """Queries of a block, the same in all layers: fewer for more keys, so that memory stays bounded."""
    return max(FEWEST, min(MOST, ENTRIES // max(1, batch * keys)))


def seen_lengths(keys: int, tokens: int, starts: Sequence[int]) -> tuple[int, ...]:
    """Keys that each of the last `tokens` of `keys` columns sees, over rows."""
    return tuple(max(0, end - first) for first in starts for end in range(keys - tokens + 1, keys + 1))


def seen_keys(keys: int, tokens: int, starts: Sequence[int]) -> int:
    """Their sum."""
    return sum(seen_lengths(keys, tokens, starts))


def simulate(
    attn: HashAttention, number: int, query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int],
    previous: Sequence[Block | None], *, scale: float | None,
) -> tuple[Tensor, list[Block]]:  # fmt: skip
    """Attend with each query to what it would choose if the tokens came one by one.

    Keys go block by block into a cache of the composition, and the block's queries attend to it: within a block each
    query sees the keys up to its own. Nothing is kept when the call ends.

    Args:
        attn: the composition bound to the layer.
        number: of the layer.
        query: [B, Hq, T, D], of the last T of the N columns.
        key, value: [B, Hkv, N, D].
        starts: first column of each row (left padding).
        previous: the blocks of the layer before in the same pass, () or None where it ran dense.
        scale: of the logits.

    Returns:
        [B, Hq, T, D], zero for queries in the padding, and the blocks.
    """
    attn = attn.searching(query.device)
    batch, tokens, keys = query.shape[0], query.shape[2], key.shape[2]
    size, wants = block_size(batch, keys), attn.selector is not None and attn.selector.needs_weights
    cache = attn.new_cache(batch, key.shape[1], key.shape[3], capacity=keys)
    outs, blocks = [], []
    for i, first in enumerate(range(0, tokens, size)):
        part = query[:, :, first : first + size]
        end = keys - tokens + first + part.shape[2]
        cache.append(key[:, :, len(cache) : end], value[:, :, len(cache) : end])
        begun = [min(start, end) for start in starts]  # rows that are padding so far see nothing
        if begun != cache._starts:
            cache.set_start(torch.tensor(begun))
        before = previous[i] if i < len(previous) else None
        step = Step(number, before.selection, before.weights) if before is not None else Step(number)
        output, selection = attn.run(part, cache, scale=scale, step=step, need_weights=wants)
        if attn.selector is not None and attn.selector.observes and not attn.selector.one_by_one:
            attn.observe(part, cache, scale=scale, step=step)  # the next block goes on from a prompt that ends here
        outs.append(output.out)
        lengths, weights = seen_lengths(end, part.shape[2], starts), output.weights if selection is not None else None
        blocks.append(Block(part.shape[2], cache, sum(lengths), selection, weights, lengths))
    return torch.cat(outs, 2), blocks


def attend_simulated(
    forward: Forward, call: Call, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    scaling: float | None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """A simulated call of one layer, with or without a cache, counted; layers that are dense by choice stay so.

    query [B, Hq, T, D], key and value [B, Hkv, N, D]; returns [B, T, Hq, D].
    """
    one, served, tokens = call.one, call.served, query.shape[2]
    kv = call.layer.kv if call.layer is not None else None
    starts, reason = [0] * query.shape[0], call.reason or served.dense
    if reason is None:
        keys = len(kv) if kv is not None else key.shape[2]
        starts, reason = forward.rows_of(call, mask, query.shape[0], keys, tokens)
    if kv is not None and key.shape[2] > len(kv):  # a static cache hands out its free columns as well
        key, value, mask = kv.keys, kv.values, mask if mask is None else mask[..., : len(kv)]
    if reason is None and served.attn is not None and not served.attn.searches:
        reason = "engine is dense"
    if reason is not None or served.attn is None:
        one.blocks = []
        with forward.ledger.guard:
            record = forward.records[call.number]
            record.dense[str(reason)] += not call.again
            if served.attn is not None and call.reason is None and not call.again:
                record.add_simulated_dense(query, key, seen_keys(key.shape[2], tokens, starts), str(reason))
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    out, one.blocks = simulate(served.attn, call.number, query, key, value, starts, one.blocks, scale=scaling)
    if not call.again:
        with forward.ledger.guard:
            forward.records[call.number].add_simulated(one.blocks, query.shape[1], served.attn.selector)
    return out.transpose(1, 2).contiguous(), None
