"""`hashattn bench e2e`: tokens per second of a whole model, hashed against the fastest dense attention."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from hashattn.lab.bench.cases import PER
from hashattn.lab.bench.cuda import need_gpu
from hashattn.lab.bench.cuda_graphs import first_line
from hashattn.lab.bench.cuda_steps import kernels
from hashattn.lab.bench.e2e_attention import DenseLayers, HashedLayers, make_caches
from hashattn.lab.bench.e2e_check import Layers, check_every_key
from hashattn.lab.bench.e2e_graphs import STEPS, capture_step, take_turns
from hashattn.lab.bench.e2e_memory import plan
from hashattn.lab.bench.e2e_model import Decoding, Llama, compile_layers, make_model
from hashattn.selectors import TopK

KEYS = ((32768, 1024), (131072, 1024))
DENSE_LAYERS = (0, 1)  # as the presets have it
ROOM = STEPS + 8
FEW = 1000  # keys of the check with a budget of all of them


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        sizes: (keys, k).
        batches: sequences; None for 1 and the most that fit.
        preset: by its name, with its own bits and budget; else the k nearest keys by linear codes,
        bits: of so many bits,
        pers: for each way to choose.
    """

    sizes: Sequence[tuple[int, int]] = KEYS
    batches: Sequence[int] | None = None
    preset: str | None = None
    bits: int = 64
    pers: Sequence[str] = PER

    def compositions(self, k: int) -> dict[str, HashAttention]:
        """What is measured at a budget, by name."""
        if self.preset is not None:
            return {self.preset: HashAttention.from_preset(self.preset, engine="gpu")}
        parts = SimHash(self.bits), FlatHamming(), TopK(k=k)
        plain = HashAttention(*parts, engine="gpu", dense_layers=DENSE_LAYERS)
        return {f"TopK per {per}": plain.replace(selector=TopK(k=k, per=per)) for per in self.pers}


@dataclass(frozen=True, eq=False)
class Bench:
    """A model that decodes on a device, and what it is compared with.

    Attributes:
        compositions: by k and name.
        dense: contenders that serve the model.
    """

    size: Llama
    model: nn.Module
    device: torch.device
    compositions: Mapping[int, Mapping[str, HashAttention]]
    dense: Mapping[str, cuda_contenders.Dense]


@torch.inference_mode()
def run(
    settings: Settings,
    size: Llama,
    *,
    compiled: bool = True,
    rounds: int = 5,
    device: str = "cuda",
    progress: bool = True,
) -> dict[str, Any]:
    """Check, then decode, greedily, in captured graphs. Weights, keys and values are random: cost, not quality.

    Args:
        settings: the cases.
        size: of the model; Llama-3-8B's is Llama().
        compiled: let torch.compile fuse the model's small operations.
        rounds: of which medians are taken.
        progress: show a bar, on a terminal.

    Returns:
        {"model", "compiled", "notes", "rows"}, times in milliseconds a step.

    Raises:
        RuntimeError: something is wrong: nothing is measured then.
        ValueError: there is no GPU, engine="gpu" does not serve a composition, or a case does not fit the memory.
    """
    where = torch.device(device)
    with refusals():
        choices = {k: settings.compositions(k) for _, k in settings.sizes}
        if device == "cuda":
            need_gpu("bench e2e")
        first, todo = _planned(settings, choices, size, where)
    notes: dict[str, None] = {}
    # More batches than torch.compile takes by default; a layer that it gave up would be slower than the others.
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    total = len(todo) + 1
    with limits, bar("hf", "hashattn bench", total=total, desc="bench", unit="case", shown=progress) as shown:
        model = make_model(size, where)
        if compiled:
            compile_layers(model)
        bench = Bench(size, model, where, choices, _check(model, size, first, where, notes))
        shown.update()
        rows = []
        for case in todo:
            rows += _measure(bench, *case, rounds)
            shown.update()
    return {"model": repr(size), "compiled": compiled, "notes": list(notes), "rows": rows}


def _planned(
    settings: Settings, choices: Mapping[int, Mapping[str, HashAttention]], size: Llama, device: torch.device
) -> tuple[HashAttention, list[tuple[int, int, int]]]:
    """A composition that the checks are made with, and (keys, k, batch) of every case.

    Raises:
        ValueError: a composition that engine="gpu" does not serve, a case that does not fit the memory.
    """
    compositions = choices[settings.sizes[0][1]]
    request = Request(device, size.dtype, 1, size.q_heads, size.kv_heads, size.head_dim)
    for name, attn in compositions.items():
        reasons = Gpu().why_not(attn.parts, request)
        if reasons:
            raise ValueError(f'bench e2e: engine="gpu" does not serve {name}: {"; ".join(reasons)}')
    first = next(iter(compositions.values()))
    assert first.encoder is not None
    first.encoder.check_fitted()
    return first, plan(size, first.encoder, settings.sizes, settings.batches, device)


def _check(
    model: nn.Module, size: Llama, attn: HashAttention, device: torch.device, notes: dict[str, None]
) -> dict[str, cuda_contenders.Dense]:
    """The dense contenders that serve the model. With a budget of every key the composition must do as they do."""
    decoding, caches = Decoding.of(model, 1, device), make_caches(attn, size, 1, FEW - 1, room=ROOM, device=device)
    q = torch.zeros(1, size.q_heads, 1, size.head_dim, dtype=size.dtype, device=device)
    served = {}
    for name, attend in cuda_contenders.dense().items():
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


def _measure(bench: Bench, keys: int, k: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    size, attns, dense, device = bench.size, bench.compositions[k], bench.dense, bench.device
    decoding = Decoding.of(bench.model, batch, device)
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
    case = {"keys": keys, "batch": batch, "kernels": kernels(), "dense": baseline}
    case |= {"dense_tokens_per_s": batch / ms[baseline] * 1e3, "ceiling": ms[baseline] / ms["no attention"]}
    return [
        {
            **case,
            "name": name,
            "composition": repr(attn),
            "dense_layers": list(attn.dense_layers),
            "ms": others | {"step": ms[name]},
            "tokens_per_s": batch / ms[name] * 1e3,
            "speedup": ms[baseline] / ms[name],
        }
        for name, attn in attns.items()
    ]
