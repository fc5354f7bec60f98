"""The decode steps that are measured on a GPU: the fused step alone, and with everything that a token needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.naming import short
from hashattn.encoders import AsymmetricHash, SimHash
from hashattn.encoders.base import Encoder
from hashattn.index import FlatHamming
from hashattn.lab.bench.caches import Kind, random_cache, twin
from hashattn.lab.bench.cases import DTYPES, Case
from hashattn.lab.bench.cuda_inputs import GpuLayer
from hashattn.ops import decode
from hashattn.ops.decode import Rule, Scratch
from hashattn.selectors import LocalTopK, Selector, TopK

Result = tuple[Tensor, ...]  # out, lse, ids, and tiers where the rule has them


def selectors(case: Case, per: str) -> dict[str, Selector]:
    """What chooses the keys, by name: each is a line of the table, where it is served. TopK must be.

    Args:
        per: "query_head" or "kv_head".
    """
    return {
        "TopK": TopK(k=case.k, per=per),
        "LocalTopK": LocalTopK(k=-(-case.k // 16) * 16, per=per),
    }


def encoders(bits: int) -> dict[str, Encoder]:
    """What encodes the newest query and key of a whole step, by name: each is a column of the table."""
    return {
        "linear": SimHash(bits),
        "MLP": AsymmetricHash(bits),  # d-256-256-bits for queries, as in DASH-KV
    }


def rule(case: Case, selector: Selector) -> Rule:
    """What the selector asks of the fused step.

    Raises:
        ValueError: it cannot be asked.
    """
    found = selector.rule(case.q_heads // case.kv_heads)
    if found is None:
        raise ValueError(f"the fused step does not serve {short(selector)}")
    return found


def why_not(case: Case, bits: int, selector: Selector, planes: int = 1) -> str | None:
    """Why the fused step does not serve a case, as the end of a sentence; None if it does."""
    asked = rule(case, selector)
    heads = case.q_heads, case.kv_heads, case.head_dim
    request = decode.KernelRequest(torch.device("cuda"), DTYPES[case.dtype], *heads, bits // 64, planes, asked)
    return "; ".join(decode.why_not(replace(request, batch=case.batch, room=case.keys))) or None


def kernels() -> str:
    """What the step is written in that runs on the current GPU: "CUDA C++" or "Triton"."""
    return decode.kernels_on(torch.device("cuda")).language


def has_stages(rule: Rule) -> bool:
    """Whether the step's scan is a kernel of its own."""
    return rule.chunks is None or kernels() == "Triton"


def first_bounds(layer: GpuLayer, rule: Rule) -> Tensor:
    """The bounds of a layer's first step, which rewrites them for the next one."""
    return torch.zeros(decode.sizes_of(layer.inputs(0, rule)).state, dtype=torch.int32, device=layer.keys.device)


def fused(
    layer: GpuLayer, i: int, bounds: Tensor, rule: Rule, scratch: Scratch, scan_only: bool = False, triton: bool = False
) -> Result:
    """The step with a layer's query i, or its first kernel alone; with tiers, logits of medium keys are estimated."""
    x = layer.inputs(i, rule)
    x = replace(x, bounds=bounds, workspace=scratch.workspace(decode.sizes_of(x).workspace, layer.keys.device))
    if layer.scores != "hamming":
        return decode.kernels_for(decode.KernelRequest.of(x)).decode(x)(x.q, x.query, x.scale, None)[:3]
    if triton or decode.kernels_for(decode.KernelRequest.of(x)).language == "Triton":
        from hashattn.ops.decode.triton.decode import decode as run
    else:
        from hashattn.ops.decode.cuda.decode import decode as run
    return tuple(part for part in run(x, scan_only)[:4] if part is not None)


def whole_caches(
    case: Case, encoder: Encoder, layers: Sequence[GpuLayer], *, room: int, scratch: Scratch
) -> list[KVCache]:
    """A cache for each layer, of as many other keys, with room for more."""
    attn = HashAttention(encoder, FlatHamming(), TopK(k=1))
    shape, device = (case.batch, case.kv_heads, case.head_dim), layers[0].keys.device
    kind = Kind(shape, case.keys, DTYPES[case.dtype], device, room, scratch)
    return [random_cache(attn, kind, seed) for seed in range(len(layers))]


def whole(
    attn: HashAttention, layers: Sequence[GpuLayer], caches: Sequence[KVCache]
) -> Callable[[GpuLayer, int], Tensor]:
    """A step with encode and append: of a layer and the number of its query, whose newest key it appends."""
    decoders = {id(layer): attn.decoder(twin(cache)) for layer, cache in zip(layers, caches, strict=True)}
    newest = {id(layer): [newest_of(layer, i) for i in range(len(layer.q))] for layer in layers}

    def step(layer: GpuLayer, i: int) -> Tensor:
        return decoders[id(layer)](layer.q[i], *newest[id(layer)][i])

    return step


def newest_of(layer: GpuLayer, i: int) -> tuple[Tensor, Tensor]:
    """A key and a value, [B, Hkv, 1, D], for query i to come with."""
    return layer.keys[:, :, i : i + 1].contiguous(), layer.values[:, :, i : i + 1].contiguous()
