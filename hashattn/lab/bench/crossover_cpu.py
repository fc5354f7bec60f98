"""`hashattn bench crossover --device cpu`: what steps and dense attention cost on this CPU, kept for engine="auto"."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from typing import Any

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.core.errors import Failure, refusals
from hashattn.core.progress import bar
from hashattn.encoders import SimHash
from hashattn.engines import cost
from hashattn.engines.base import Request
from hashattn.engines.host import why_not_compiled
from hashattn.index import FlatHamming
from hashattn.lab.bench import cpu
from hashattn.lab.bench.cases import DTYPES, Case
from hashattn.lab.bench.dense import DENSE
from hashattn.lab.bench.measure import take_turns
from hashattn.selectors import TopK

KEYS, SMALL, FEW, MANY = 32_768, 256, 8, 1024
HEADS, DIM, LAYERS = (8, 2), 128, 6  # query and KV heads: 6 layers are more than a last-level cache keeps
SHARES = (0.01, 0.05)


def composition(k: int, query_bits: int = 1) -> HashAttention:
    """What is measured: each query head keeps the k nearest keys."""
    return HashAttention(SimHash(query_bits=query_bits, centring=None), FlatHamming(), TopK(k=k), engine="cpu")


@torch.inference_mode()
def run(*, rounds: int = 9, progress: bool = True, shape: Case | None = None) -> dict[str, Any]:
    """Measure, on one thread, and say from how many keys on a step pays. Keys are random: cost, not quality.

    Args:
        rounds: of which medians are taken.
        progress: show a bar, on a terminal.
        shape: of a model, for the crossovers that are shown; 32/8 heads of 128 in float32 if left out.

    Returns:
        {"cpu", "costs": of engines.cost.Costs, "rows": [...]}

    Raises:
        ValueError: the compiled loops do not run here.
        RuntimeError: a step is wrong: nothing is measured then.
    """
    parts = composition(FEW).parts
    asked = Request(torch.device("cpu"), torch.float32, 1, *HEADS, DIM)
    with refusals(ValueError):
        if reasons := why_not_compiled(parts, asked):
            raise ValueError(f"compiled steps cannot be measured: {'; '.join(reasons)}")
    cpu.check(Case(*HEADS, DIM, "float32", 4096, 64), 128, "query_head")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        us = {name: _times(name, rounds) for name in bar("hf", "hashattn bench", DTYPES_TRIED, shown=progress)}
    finally:
        torch.set_num_threads(before)
    found = costs_of(us)
    case = shape or Case(32, 8, DIM, "float32", 1, 1)
    return {"cpu": cost.cpu_name(), "us": us, "costs": asdict(found), "rows": list(_crossovers(found, case))}


DTYPES_TRIED = ("float32", "bfloat16")


def costs_of(us: dict[str, dict[str, float]]) -> cost.Costs:
    """What times of steps of each kind say of their parts.

    Raises:
        RuntimeError: larger steps were not slower, as on a machine that does much else: measure again.
    """
    full, half, q_heads = us["float32"], us["bfloat16"], HEADS[0]
    pairs = q_heads * (KEYS - SMALL)
    word = (full["planes"] - full["few"]) / pairs / 2 * 1e3  # one plane of two words more
    choice = (full["few"] - full["small"]) / pairs * 1e3 - 2 * word
    rows = q_heads * (MANY - FEW) * 2
    wide, narrow = ((x["many"] - x["few"]) / rows * 1e3 for x in (full, half))
    byte = max(0.0, (wide - narrow) / (2 * DIM))
    row = max(0.0, narrow - byte * 2 * DIM)
    if min(word, wide, narrow) <= 0:
        raise Failure("steps over more keys were not slower: the machine does much else, measure again")
    key_bytes = [2 * HEADS[1] * DIM * DTYPES[name].itemsize * KEYS for name in DTYPES_TRIED]
    streams = [size / x["dense"] for size, x in zip(key_bytes, (full, half), strict=True)]
    source = f"this machine, {date.today().isoformat()}"
    numbers = full["small"], word, max(0.0, choice), row, byte, *streams
    call, word, choice, row, byte, stream, half_stream = (round(x, 4) for x in numbers)
    return cost.Costs(call, word, choice, row, byte, stream, half_stream, source)


def _times(dtype: str, rounds: int) -> dict[str, float]:
    kinds = {
        "small": (composition(FEW), SMALL),
        "few": (composition(FEW), KEYS),
        "many": (composition(MANY), KEYS),
        "planes": (composition(FEW, query_bits=2), KEYS),
    }
    layers = {name: [_layer(attn, keys, dtype, seed) for seed in range(LAYERS)] for name, (attn, keys) in kinds.items()}
    calls = {name: lambda i, name=name: cpu._step(kinds[name][0], layers[name][i]) for name in kinds}
    dense = {
        name: lambda i, f=f: f(layers["few"][i].q, layers["few"][i].cache.keys, layers["few"][i].cache.values)
        for name, f in DENSE.items()
    }
    us = take_turns(calls | dense, LAYERS, rounds)
    return {name: us[name] for name in kinds} | {"dense": min(us[name] for name in DENSE)}


def _layer(attn: HashAttention, keys: int, dtype: str, seed: int) -> cpu.TimedLayer:
    g = torch.Generator().manual_seed(seed)

    def drawn(heads: int, n: int) -> Tensor:
        return torch.randn(1, heads, n, DIM, generator=g).to(DTYPES[dtype])

    cache = attn.new_cache(1, HEADS[1], DIM, capacity=keys)
    cache.append(drawn(HEADS[1], keys), drawn(HEADS[1], keys))
    cache.encode()
    return cpu.TimedLayer(drawn(HEADS[0], 1), cache)


def _crossovers(found: cost.Costs, case: Case) -> Any:
    for share in SHARES:
        for per in ("query_head", "kv_head"):
            attn = HashAttention(SimHash(), FlatHamming(), TopK(share=share, per=per))
            asked = Request(torch.device("cpu"), DTYPES[case.dtype], 1, case.q_heads, case.kv_heads, case.head_dim)
            keys = cost.crossover(attn.parts, asked, compiled=True, known=found)
            yield {"shape": case.shape, "per": per, "share": share, "keys": keys}
