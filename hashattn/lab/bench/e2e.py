"""`hashattn bench --e2e`: tokens per second of a whole model, hashed against the fastest dense attention."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn

from hashattn.attention import HashAttention
from hashattn.core.errors import Failure, refusals
from hashattn.core.progress import bar
from hashattn.encoders import SimHash
from hashattn.engines.base import Request
from hashattn.engines.gpu import Gpu
from hashattn.index import FlatHamming
from hashattn.lab.bench import cuda_contenders
from hashattn.lab.bench.cuda import need_gpu
from hashattn.lab.bench.cuda_graphs import first_line
from hashattn.lab.bench.cuda_steps import kernels
from hashattn.lab.bench.e2e_attention import DenseLayers, HashedLayers, make_caches
from hashattn.lab.bench.e2e_check import Layers, check_every_key
from hashattn.lab.bench.e2e_graphs import STEPS, capture_step, take_turns
from hashattn.lab.bench.e2e_memory import plan
from hashattn.lab.bench.e2e_model import Decoding, Llama, compile_layers, make_model
from hashattn.ops.decode import Scratch
from hashattn.selectors import TopK

KEYS = ((32768, 1024), (131072, 1024))
DENSE_LAYERS = (0, 1)  # as the presets have it
ROOM = STEPS + 8
FEW = 1000  # keys of the check with a budget of all of them


def compositions(k: int, bits: int, pers: Sequence[str], preset: str | None) -> dict[str, HashAttention]:
    """What is measured, by name: a preset; or the k nearest keys by linear codes, for each way to choose."""
    if preset is not None:
        return {preset: HashAttention.from_preset(preset, engine="gpu")}
    return {
        f"TopK per {per}": HashAttention(
            SimHash(bits), FlatHamming(), TopK(k=k, per=per), engine="gpu", dense_layers=DENSE_LAYERS
        )
        for per in pers
    }


@torch.inference_mode()
def run(
    sizes: Sequence[tuple[int, int]] = KEYS, *, batches: Sequence[int] | None = None, bits: int = 64,
    pers: Sequence[str] = ("query_head", "kv_head"), preset: str | None = None, compiled: bool = True, rounds: int = 5,
    model_size: Llama | None = None, device: str = "cuda", progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Check, then decode, greedily, in captured graphs. Weights, keys and values are random: cost, not quality.

    Args:
        sizes: (keys, k).
        batches: sequences; None for 1 and the most that fit.
        bits, pers, preset: see compositions(); a preset has its own bits and budget.
        compiled: let torch.compile fuse the model's small operations.
        rounds: of which medians are taken.
        model_size: Llama-3-8B's by default.
        progress: show a bar, on a terminal.

    Returns:
        {"model", "compiled", "notes", "rows"}, times in milliseconds a step.

    Raises:
        RuntimeError: something is wrong: nothing is measured then.
        ValueError: there is no GPU, engine="gpu" does not serve a composition, or a case does not fit the memory.
    """
    size, where = model_size or Llama(), torch.device(device)
    with refusals():
        choices = {k: compositions(k, bits, pers, preset) for _, k in sizes}
        if device == "cuda":
            need_gpu("--e2e")
        first = next(iter(choices[sizes[0][1]].values()))
        for name, attn in choices[sizes[0][1]].items():
            request = Request(where, size.dtype, 1, size.q_heads, size.kv_heads, size.head_dim)
            reasons = Gpu().why_not(attn.parts, request)
            if reasons:
                raise ValueError(f'--e2e: engine="gpu" does not serve {name}: {"; ".join(reasons)}')
        assert first.encoder is not None
        first.encoder.check_fitted()
        todo = plan(size, first.encoder, sizes, batches, where)
    notes: dict[str, None] = {}
    # More batches than torch.compile takes by default; a layer that it gave up would be slower than the others.
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    total = len(todo) + 1
    with limits, bar("hf", "hashattn bench", total=total, desc="bench", unit="case", shown=progress) as shown:
        model = make_model(size, where)
        if compiled:
            compile_layers(model)
        dense = _check(model, size, first, where, notes)
        shown.update()
        rows = []
        for keys, k, batch in todo:
            rows += _measure(model, size, choices[k], dense, keys, batch, rounds, where)
            shown.update()
    return {"model": repr(size), "compiled": compiled, "notes": list(notes), "rows": rows}


def _check(
    model: nn.Module, size: Llama, attn: HashAttention, device: torch.device, notes: dict[str, None]
) -> dict[str, cuda_contenders.Dense]:
    """The dense contenders that serve the model. With a budget of every key the composition must do as they do."""
    decoding, caches = Decoding.of(model, 1, device), make_caches(attn, size, 1, FEW - 1, room=ROOM, device=device)
    q = torch.zeros(1, size.q_heads, 1, size.head_dim, dtype=size.dtype, device=device)
    served = {}
    for name, attend in cuda_contenders.dense(Scratch()).items():
        try:
            attend(q, caches[0].keys, caches[0].values)
            served[name] = attend
        except Exception as error:  # each library has its own way to say that it does not serve a shape
            notes[f"{name} is left out: {first_line(error)}"] = None
    if not served:
        raise Failure("no dense attention ran; nothing is measured")
    layers: dict[str, Layers] = {name: DenseLayers(attend, caches, FEW) for name, attend in served.items()}
    some = next(iter(layers.values()))
    for per in ("query_head", "kv_head"):
        every = attn.replace(selector=TopK(share=1.0, per=per), dense_layers=())
        layers[f"every key per {per}"] = HashedLayers(every, caches, FEW, some)
    check_every_key(decoding, layers, caches, FEW)
    return served


def _measure(
    model: nn.Module, size: Llama, attns: Mapping[str, HashAttention], dense: Mapping[str, cuda_contenders.Dense],
    keys: int, batch: int, rounds: int, device: torch.device,
) -> list[dict[str, Any]]:  # fmt: skip
    decoding = Decoding.of(model, batch, device)
    caches = make_caches(next(iter(attns.values())), size, batch, keys - 1, room=ROOM, device=device)
    layers: dict[str, Layers] = {name: DenseLayers(attend, caches, keys) for name, attend in dense.items()}
    layers["no attention"] = DenseLayers(lambda q, *_: q, caches, keys)
    steps = {name: capture_step(name, decoding, attend, keys) for name, attend in layers.items()}
    ms = take_turns(decoding, steps, keys, 1)
    baseline = min(dense, key=lambda name: ms[name])
    for name, attn in attns.items():
        layers[name] = HashedLayers(attn, caches, keys, layers[baseline])
        steps[name] = capture_step(name, decoding, layers[name], keys)
    ms = take_turns(decoding, steps, keys, rounds)
    baseline = min(dense, key=lambda name: ms[name])
    del steps, layers, caches
    gc.collect()  # the next case needs the memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    others = {name: ms[name] for name in (*dense, "no attention")}
    return [
        {
            "keys": keys, "batch": batch, "name": name, "composition": repr(attn),
            "kernels": kernels(), "dense_layers": list(attn.dense_layers), "dense": baseline,
            "ms": others | {"step": ms[name]},
            "tokens_per_s": batch / ms[name] * 1e3, "dense_tokens_per_s": batch / ms[baseline] * 1e3,
            "speedup": ms[baseline] / ms[name], "ceiling": ms[baseline] / ms["no attention"],
        }
        for name, attn in attns.items()
    ]  # fmt: skip
