"""What a decode step on a GPU reads: random queries, keys, values and codes, of more layers than a cache holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.bench.cases import DTYPES, Case
from hashattn.bench.floors import code_bytes
from hashattn.ops.decode import Rule
from hashattn.ops.decode.sizes import LEVELS

COLD = 200 << 20  # bytes of the codes of all layers: several times an L2 cache, whatever else a step reads
MEMORY = 40 << 30  # and may hold
CALLS = 12


@dataclass(frozen=True)
class Layer:
    """One layer's cache, and the queries of some decode steps, which find what the step before them left in bounds."""

    q: list[Tensor]
    query: list[Tensor]
    keys: Tensor
    values: Tensor
    codes: Tensor
    starts: Tensor
    length: Tensor
    bounds: Tensor


def rule(case: Case, per: str) -> Rule:
    """The k nearest keys, chosen by each query head or by each KV head."""
    return Rule(k=case.k, shared=per == "kv_head")


def layer_count(case: Case, bits: int) -> int:
    """Layers that are too much for a cache and not for the memory."""
    codes = code_bytes(case, bits)
    return max(1, min(max(3, -(-COLD // codes)), MEMORY // (case.dense_bytes + codes)))


def step_count(layers: int) -> int:
    """Steps of each layer: at least 2, so that bounds are never those of the same query, and CALLS calls in all."""
    return max(2, -(-CALLS // layers))


def make_layer(
    case: Case, bits: int, per: str, *, steps: int, clustered: bool, seed: int, device: torch.device
) -> Layer:
    """A layer of random keys.

    Args:
        steps: queries to make.
        clustered: queries and one sixty-fourth of the keys, which are neighbours, have codes near a common one.
    """
    g = torch.Generator(device).manual_seed(seed)
    dtype, words, group = DTYPES[case.dtype], bits // 64, case.q_heads // case.kv_heads
    kv = (case.batch, case.kv_heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    def random_bits(*shape: int) -> Tensor:
        octets = torch.randint(0, 256, (*shape[:-1], 8 * shape[-1]), generator=g, device=device, dtype=torch.uint8)
        return octets.view(torch.int64)

    def few_bits(*shape: int) -> Tensor:  # one in eight
        return random_bits(*shape) & random_bits(*shape) & random_bits(*shape)

    codes = random_bits(*kv, case.keys, words)
    queries = [random_bits(*kv, group, words) for _ in range(steps)]
    if clustered:
        centre = random_bits(*kv, 1, words)
        first, width = case.keys // 2, max(1, case.keys // 64)
        codes[:, :, first : first + width] = centre ^ few_bits(*kv, width, words)
        queries = [centre ^ few_bits(*kv, group, words) for _ in range(steps)]
    rows = case.batch * (case.kv_heads if per == "kv_head" else case.q_heads)
    return Layer(
        [normal(case.batch, case.q_heads, 1, case.head_dim) for _ in range(steps)],
        [query.view(case.batch, case.q_heads, 1, 1, words) for query in queries],
        normal(*kv, case.keys, case.head_dim), normal(*kv, case.keys, case.head_dim), codes,
        torch.zeros(case.batch, dtype=torch.int32, device=device),
        torch.tensor([case.keys], dtype=torch.int32, device=device),
        torch.zeros((1 + 1 + LEVELS, rows), dtype=torch.int32, device=device),
    )  # fmt: skip
