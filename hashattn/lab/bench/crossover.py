"""`hashattn bench crossover`: from how many keys on a step is clearly faster than dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from hashattn.attention import HashAttention
from hashattn.core.errors import refusals
from hashattn.core.progress import bar
from hashattn.encoders import SimHash
from hashattn.engines.gpus import Gpu
from hashattn.index import FlatHamming
from hashattn.lab.bench.caches import Kind, random_cache, twin
from hashattn.lab.bench.cases import DTYPES, Case, Settings
from hashattn.lab.bench.cuda import refuse
from hashattn.lab.bench.cuda_check import attention, check_alike, check_rounding
from hashattn.lab.bench.cuda_graphs import capture_turns, checked_step, dense_graphs, make_layers, turns_of
from hashattn.lab.bench.cuda_steps import kernels, rule, selectors
from hashattn.lab.bench.graphs import take_turns
from hashattn.lab.bench.measure import take_turns as take_turns_from_python
from hashattn.ops.decode import Scratch

MARGIN = 0.9  # of dense attention's time: what is clearly faster
K = 256
LARGEST = {"eager": 8 << 30, "captured": 1 << 30}  # bytes of keys and values that are tried
LEAST = 2048  # keys
ROUNDS = {"eager": 15, "captured": 5}
LAYERS = 3  # of eager steps

Times = dict[str, float]  # of "dense" and "step"


def sizes(key_bytes: int, largest: int) -> list[int]:
    """Numbers of keys that are tried: powers of 2 and the middles between them, up to so many bytes."""
    powers = [LEAST << i for i in range(32)]
    return [n for power in powers for n in (power, power * 3 // 2) if n * key_bytes <= largest]


def first_win(tried: Sequence[int], measure: Callable[[int], Times]) -> tuple[int | None, dict[int, Times]]:
    """The least of these numbers of keys from which a step wins clearly, found by bisection, and what was measured.

    A step that wins is taken to win with more keys as well. None if it does not win at all.
    """
    low, high, measured = 0, len(tried), {}
    while low < high:
        middle = (low + high) // 2
        times = measured[tried[middle]] = measure(tried[middle])
        if times["step"] <= MARGIN * times["dense"]:
            high = middle
        else:
            low = middle + 1
    return (tried[low] if low < len(tried) else None), dict(sorted(measured.items()))


def eager(case: Case, bits: int, per: str) -> Times:
    """Microseconds of attn.run from Python, the newest key's encoding included, searching and dense."""
    attn = HashAttention(SimHash(bits), FlatHamming(), selectors(case, per)["TopK"], engine="gpu")
    device, dtype, shape = torch.device("cuda"), DTYPES[case.dtype], (case.batch, case.kv_heads, case.head_dim)
    kind = Kind(shape, case.keys, dtype, device)
    caches = [random_cache(attn, kind, seed) for seed in range(LAYERS)]
    q = torch.randn(case.batch, case.q_heads, 1, case.head_dim, dtype=dtype, device=device)

    def step(i: int) -> object:
        caches[i].forget_code()
        return attn.run(q, caches[i])

    dense, plain = attn.replace(engine="dense"), attn.replace(engine="reference")
    check_alike(f"{case}: the step", attn(q, caches[0]), plain(q, caches[0]))
    for b, out in enumerate(dense(q, caches[0])):
        exact, size = attention(q[b], caches[0].keys[b].float(), caches[0].values[b].float())
        check_rounding(f"{case}: dense attention", out, exact, size)
    others = [twin(cache) for cache in caches]  # a cache remembers the composition that it was last checked with
    calls = {"dense": lambda i: dense.run(q, others[i]), "step": step}
    return take_turns_from_python(calls, LAYERS, ROUNDS["eager"], torch.cuda.synchronize)


def captured(case: Case, bits: int, per: str, notes: dict[str, None]) -> Times:
    """Microseconds of a captured step, encoding left out, and of the fastest dense attention."""
    layers = make_layers(case, bits, clustered=False)
    turns = turns_of(layers)
    dense = dense_graphs(case, layers, turns, notes)
    step = checked_step(case, rule(case, selectors(case, per)["TopK"]), layers, Scratch())
    us = take_turns(dense | {"step": capture_turns(step, turns)}, len(turns), ROUNDS["captured"])
    return {"dense": min(us[name] for name in dense), "step": us["step"]}


@torch.inference_mode()
def run(
    shape: tuple[int, int, int, str], batches: Sequence[int], settings: Settings, *, progress: bool = True
) -> dict[str, Any]:
    """Measure a shape's crossovers, with the K nearest keys kept. Keys are random: cost, not quality.

    Args:
        shape: query heads, KV heads, head_dim, dtype.
        batches: sequences.
        settings: bits of the codes, and who chooses.
        progress: show a bar, on a terminal.

    Returns:
        {"margin", "k", "notes", "bytes", "rows"}; see constants() for "bytes".

    Raises:
        RuntimeError: a step is wrong: nothing is measured then.
        ValueError: there is no GPU, or the step does not serve the shape.
    """
    with refusals(ValueError):
        refuse([Case(*shape, LEAST, K, batch=batch) for batch in batches], settings)
    notes: dict[str, None] = {}
    bits = settings.bits
    modes: dict[str, Callable[[Case, str], Times]] = {
        "eager": lambda case, per: eager(case, bits, per),
        "captured": lambda case, per: captured(case, bits, per, notes),
    }
    todo = [(mode, batch, per) for mode in modes for batch in batches for per in settings.pers]
    rows = []
    for mode, batch, per in bar("hf", "hashattn bench", todo, desc="bench", unit="crossover", shown=progress):

        def measure(keys: int, mode: str = mode, batch: int = batch, per: str = per) -> Times:
            times = modes[mode](Case(*shape, keys, K, batch=batch), per)
            torch.cuda.empty_cache()
            return times

        one = Case(*shape, 1, 1, batch=batch)
        key_bytes = one.dense_bytes
        least, measured = first_win(sizes(key_bytes, LARGEST[mode]), measure)
        where = {"mode": mode, "shape": one.shape, "batch": batch, "per": per, "bits": bits, "kernels": kernels()}
        times = [{"keys": keys, **us} for keys, us in measured.items()]
        rows.append(where | {"keys": least, "bytes": None if least is None else least * key_bytes, "us": times})
    return {"margin": MARGIN, "k": K, "notes": list(notes), "bytes": constants(rows), "rows": rows}


def constants(rows: Iterable[dict[str, Any]]) -> dict[str, int | None]:
    """For each mode the most bytes of any row: from there on a step wins in all of them. None if it does not in one."""
    found: dict[str, int | None] = {}
    for row in rows:
        mode, now = row["mode"], row["bytes"]
        before = found.get(mode, 0)
        found[mode] = None if now is None or before is None else max(now, before)
    return found


def entry(name: str, capability: tuple[int, int], found: dict[str, int | None], source: str) -> str:
    """The line for hashattn/engines/gpus.py."""
    if None in found.values():
        return "There is no line for hashattn/engines/gpus.py: a step did not win everywhere."
    gpu = Gpu(capability, found["eager"] or 0, found["captured"] or 0, source)
    return f"For hashattn/engines/gpus.py:\n    {name!r}: {gpu},"
