"""`hashattn bench cpu`: a whole decode step against the fastest dense attention in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.errors import Failure, refusals
from hashattn.core.progress import bar
from hashattn.core.threads import thread_count
from hashattn.encoders import SimHash
from hashattn.engines.base import Request
from hashattn.engines.host import why_not_compiled
from hashattn.index import FlatHamming
from hashattn.lab.bench.cases import DTYPES, Case
from hashattn.lab.bench.dense import DENSE
from hashattn.lab.bench.measure import read_bandwidth, take_turns
from hashattn.selectors import Sink, TopK

_COLD = 96 << 20  # bytes that the layers of a round read together: more than a last-level cache keeps
_MEMORY = 5 << 30  # and may hold
_LAYERS = 64


@dataclass(frozen=True)
class TimedLayer:
    """One layer's queries and its cache."""

    q: Tensor
    cache: KVCache


def composition(k: int, bits: int, per: str, engine: str = "cpu") -> HashAttention:
    """What is measured: SimHash codes, the k nearest keys, exact attention to them."""
    return HashAttention(SimHash(bits), FlatHamming(), TopK(k=k, per=per), engine=engine)


@torch.inference_mode()
def run(
    cases: Iterable[Case],
    *,
    bits: int = 128,
    per: str = "kv_head",
    rounds: int = 9,
    sparse: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Check and measure every case. Keys are random: what is measured is cost, not quality.

    Args:
        cases: what to measure.
        bits: of the codes.
        per: "kv_head" or "query_head": who chooses.
        rounds: of which medians are taken.
        sparse: also force the search; otherwise only engine="auto" is compared with dense attention.
        progress: show a bar, on a terminal.

    Returns:
        {"read_GB_per_s": {threads: ...}, "rows": [...]}, times in microseconds a layer. "the same loops" is dense
        attention as compiled steps would make it: all keys kept, each read once for its group.

    Raises:
        RuntimeError: a case selects other keys than the reference or attends to them wrongly: nothing is measured.
    """
    cases = list(cases)
    with refusals(ValueError, TypeError):
        composition(1, bits, per)  # refuses wrong numbers before anything runs
        for case in cases:
            thread_count(case.threads)
    before, bandwidths, rows = torch.get_num_threads(), {}, []
    try:
        for case in bar("hf", "hashattn bench", cases, desc="bench", unit="case", shown=progress):
            torch.set_num_threads(case.threads)
            if case.threads not in bandwidths:
                bandwidths[case.threads] = read_bandwidth()
            rows.append(_measure(case, bits, per, rounds, sparse, bandwidths[case.threads]))
    finally:
        torch.set_num_threads(before)
    return {"read_GB_per_s": {str(t): b / 1e9 for t, b in bandwidths.items()}, "rows": rows}


def check(case: Case, bits: int, per: str) -> None:
    """Raise Failure unless the CPU engine selects what the reference selects, and attends to it as it should.

    The selected sets must be equal. Outputs may differ from float64 attention over the same keys by the rounding of
    the values' dtype and of float32 sums.
    """
    layer = _layer(case, composition(case.k, bits, per), seed=1)
    attn = composition(case.k, bits, per)
    output, found = attn.run(layer.q, layer.cache)
    _, expected = attn.replace(engine="reference").run(layer.q, layer.cache)
    assert found is not None and expected is not None
    if not torch.equal(found.ids.sort().values, expected.ids.sort().values):
        raise Failure(f"{case}: the CPU engine selects other keys than the reference; nothing is measured")
    keys, values = (layer.cache.gather(what, found.ids)[:, :, 0].double() for what in ("keys", "values"))
    grouped = layer.q.double().view(1, keys.shape[1], -1, case.head_dim)  # heads that share a choice
    exact = F.scaled_dot_product_attention(grouped, keys, values).view(layer.q.shape)
    error = (output.out.double() - exact).abs().max().item()
    allowed = 8 * torch.finfo(DTYPES[case.dtype]).eps * values.abs().max().item()
    if not error <= allowed:
        raise Failure(f"{case}: the output is off by {error:.2e}, {allowed:.2e} is allowed; nothing is measured")


def _layer(case: Case, attn: HashAttention, seed: int) -> TimedLayer:
    g = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    q = torch.randn(1, case.q_heads, 1, case.head_dim, generator=g).to(dtype)
    k, v = (torch.randn(1, case.kv_heads, case.keys, case.head_dim, generator=g).to(dtype) for _ in range(2))
    cache = attn.new_cache(1, case.kv_heads, case.head_dim, capacity=case.keys)
    cache.append(k, v)
    cache.encode()
    return TimedLayer(q, cache)


def _measure(case: Case, bits: int, per: str, rounds: int, sparse: bool, bandwidth: float) -> dict[str, Any]:
    attn = composition(case.k, bits, per)
    searchable = case.keys >= attn.new_cache(1, 1, 8).warmup
    if searchable:
        check(case, bits, per)
    plan = attn.explain(
        q_heads=case.q_heads, kv_heads=case.kv_heads, head_dim=case.head_dim, keys=case.keys, dtype=DTYPES[case.dtype]
    )
    count = max(1, min(_LAYERS, -(-_COLD // plan.step_bytes), _MEMORY // case.dense_bytes))
    layers = [_layer(case, attn, seed) for seed in range(count)]
    auto = attn.replace(engine="auto")
    calls: dict[str, Callable[[int], object]] = {
        name: lambda i, f=f: f(layers[i].q, layers[i].cache.keys, layers[i].cache.values)  # type: ignore[misc]
        for name, f in DENSE.items()
    }
    calls["auto"] = lambda i: _step(auto, layers[i])
    every = attn.replace(selector=Sink(case.keys) | TopK(k=1, per="kv_head"))
    if not why_not_compiled(every.parts, Request.of(layers[0].q, layers[0].cache)):
        calls["the same loops"] = lambda i: every.run(layers[i].q, layers[i].cache)
    if sparse and searchable:
        encoder = attn.encoder
        assert encoder is not None
        calls["step"] = lambda i: _step(attn, layers[i])
        calls["encode query"] = lambda i: encoder.encode_query(layers[i].q)
        calls["encode key"] = lambda i: encoder.encode_key(layers[i].cache.keys[:, :, -1:], layers[i].cache.centre)
    times = take_turns(calls, count, max(rounds, 60 // count))
    baseline = min(DENSE, key=lambda name: times[name])
    row = {"shape": case.shape, "keys": case.keys, "k": case.k, "per": per, "bits": bits, "threads": case.threads}
    row |= {"layers": count, "dense": baseline, "us": times}
    chosen = auto.choice(layers[0].q, layers[0].cache).at(case.keys)
    row |= {"auto_engine": chosen.name, "auto_cost": times["auto"] / times[baseline]}
    row["over_loops"] = times["the same loops"] / times["step"] if {"step", "the same loops"} <= {*times} else None
    row["speedup"] = times[baseline] / times["step"] if "step" in times else None
    row |= {"floor_us": plan.step_bytes / bandwidth * 1e6, "dense_floor_us": case.dense_bytes / bandwidth * 1e6}
    return row


def _step(attn: HashAttention, layer: TimedLayer) -> object:
    """A decode step: the newest key waits to be encoded, as it does after every append."""
    layer.cache.forget_code()
    return attn.run(layer.q, layer.cache)
