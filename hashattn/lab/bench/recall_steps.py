"""One layer decoded token by token: what is kept, what comes out, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.errors import Failure
from hashattn.core.naming import short
from hashattn.core.types import Output, Selection, Step
from hashattn.engines import choose
from hashattn.lab.bench.dense import DENSE
from hashattn.lab.bench.recall_data import CapturedLayer
from hashattn.lab.kept import kept_by

_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest value: sums in another order


@dataclass(frozen=True, eq=False)
class Decoded:
    """What T steps did.

    Attributes:
        kept: bool [Hq, T, N].
        out: float32 [Hq, T, D].
        choices: keys that a choice keeps, on average; a group that chooses together makes one.
        us: microseconds of each step: appending the key, encoding it and the query, searching, attending.
        dense_us: those of each dense attention, right after.
        after: each token's step for the next layer, with what was kept here.
    """

    kept: Tensor
    out: Tensor
    choices: float
    us: list[float]
    dense_us: dict[str, list[float]]
    after: list[Step]


@torch.inference_mode()
def decode(attn: HashAttention, layer: CapturedLayer, tokens: int, before: Sequence[Step] | None = None) -> Decoded:
    """Prefill all but the last `tokens` positions, densely, then decode those one by one.

    Args:
        attn: fitted to the layer; its engine searches.
        before: the steps that the layer before handed on; None if it was not decoded.

    Raises:
        RuntimeError: in the last step the engine keeps other keys than the reference, or attends to them wrongly.
    """
    keys, first = layer.k.shape[2], layer.k.shape[2] - tokens
    cache = attn.new_cache(1, layer.k.shape[1], layer.k.shape[3])
    cache.append(layer.k[:, :, :first], layer.v[:, :, :first])
    looks_back = attn.selector is not None and attn.selector.accumulates
    if looks_back:  # it is shown what full attention attends to
        attn.replace(engine="dense").run(layer.q[:, :, :first], cache, scale=layer.scale, step=Step(layer.number))
    cache.encode()
    wants = attn.selector is not None and attn.selector.needs_weights
    kept = torch.zeros(layer.q.shape[1], tokens, keys, dtype=torch.bool, device=layer.k.device)
    outs, us, slots, after = [], [], [], []
    dense_us: dict[str, list[float]] = {name: [] for name in DENSE}

    def now() -> float:
        if layer.k.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for t in range(tokens):
        q, k, v = (x[:, :, first + t : first + t + 1].contiguous() for x in (layer.q, layer.k, layer.v))
        step = before[t] if before is not None else Step(layer.number)
        began = now()
        cache.append(k, v)
        output, selection = attn.run(q, cache, scale=layer.scale, step=step, need_weights=wants)
        us.append((now() - began) * 1e6)
        for name, dense in DENSE.items():
            began = now()
            dense(q, cache.keys, cache.values)
            dense_us[name].append((now() - began) * 1e6)
        kept[:, t] = _mask(selection, cache, kept)
        outs.append(output.out[0, :, 0])
        slots.append(len(cache) if selection is None else float(selection.count.float().mean()))
        after.append(Step(layer.number + 1, selection, output.weights if selection is not None else None))
    if not looks_back:  # which would go by this step's own attention
        _check(attn, q, cache, step, layer.scale, output, kept[:, -1])
    return Decoded(kept.cpu(), torch.stack(outs, 1).float().cpu(), statistics.mean(slots), us, dense_us, after)


def costs(attn: HashAttention, layer: CapturedLayer, decoded: Decoded) -> dict[str, Any]:
    """Bytes of bfloat16 keys and values as the query plan has them, and median microseconds.

    key_bytes: kept for a key and KV head beside the key itself: code, norm.
    scan_bytes: read by a step to rank the keys; read_bytes: also the keys and values that it attends to.
    us: of a step; dense_us: of the fastest dense attention.
    """
    q_heads, kv_heads, keys, dim = layer.q.shape[1], layer.k.shape[1], *layer.k.shape[2:]
    shape = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": dim, "keys": keys}
    plan = attn.explain(**shape, dtype=torch.bfloat16, device=layer.k.device.type)
    share = 1.0
    if plan.engine != choose.DENSE.name and attn.selector is not None:  # of the plan's keys, which are the most
        planned = min(keys, attn.selector.budget(keys) * attn.selector.choices(q_heads, kv_heads)[1])
        share = min(1.0, decoded.choices / planned)
    return {
        "engine": plan.engine,
        "key_bytes": plan.code_bytes / kv_heads / keys,
        "scan_bytes": plan.scan_bytes,
        "read_bytes": plan.scan_bytes + share * plan.attend_bytes,
        "dense_bytes": plan.dense_bytes,
        "us": statistics.median(decoded.us),
        "dense_us": min(statistics.median(times) for times in decoded.dense_us.values()),
    }


def _mask(selection: Selection | None, cache: KVCache, like: Tensor) -> Tensor:
    """bool [Hq, N] of the keys that one token keeps."""
    if selection is None:
        return (torch.arange(like.shape[-1], device=like.device) < len(cache)).expand(like.shape[0], -1)
    return kept_by(selection, like[:, :1])[:, 0]


def _check(
    attn: HashAttention, q: Tensor, cache: KVCache, step: Step, scale: float, output: Output, kept: Tensor
) -> None:
    """Raise RuntimeError unless the reference does the same."""
    expected, selection = attn.replace(engine="reference").run(q, cache, scale=scale, step=step)
    if not torch.equal(_mask(selection, cache, kept[:, None]), kept):
        raise Failure(f"engine {attn.engine!r} selects other keys than the reference: {short(attn)}")
    error = (output.out - expected.out).abs().max().item()
    if not error <= _ROUNDING[output.out.dtype] * cache.values.abs().max().item():
        raise Failure(f"the output of engine {attn.engine!r} is off by {error:.2e}: {short(attn)}")
