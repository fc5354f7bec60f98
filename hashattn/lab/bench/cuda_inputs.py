"""What a decode step on a GPU reads: random queries, keys, values and codes, of more layers than a cache holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hashattn.lab.bench.cases import DTYPES, Case
from hashattn.lab.bench.floors import code_bytes
from hashattn.ops.decode import Before, Estimate, Inputs, Rule, Stored
from hashattn.ops.hamming import query_planes

COLD = 200 << 20  # bytes of the codes of all layers: several times an L2 cache, whatever else a step reads
MEMORY = 20 << 30  # and may hold: whole steps take as much again for each encoder
CALLS = 12


@dataclass(frozen=True)
class GpuLayer:
    """One layer's cache, the queries of some decode steps, what estimates of logits are made from, if any are, and
    what the layer before kept, if anyone asks. See Inputs for the family of scores and its pages."""

    q: list[Tensor]
    query: list[Tensor]
    keys: Tensor
    values: Tensor
    codes: Tensor
    starts: Tensor
    length: Tensor
    estimate: Estimate | None = None
    before: Before | None = None
    scores: str = "hamming"
    page: int = 1

    def inputs(self, i: int, rule: Rule) -> Inputs:
        """The step with query i; with critical keys in the rule the logits of the others are estimated."""
        stored = Stored(self.keys, self.values, self.codes, self.length)
        scale, estimate = self.q[i].shape[-1] ** -0.5, self.estimate if rule.critical is not None else None
        before = self.before if rule.prior_ratio is not None else None
        x = Inputs(self.q[i], self.query[i], stored, self.starts, rule, scale, estimate=estimate, before=before)
        return replace(x, scores=self.scores, page=self.page)


def layer_count(case: Case, bits: int) -> int:
    """Layers that are too much for a cache and not for the memory."""
    codes = code_bytes(case, bits)
    return max(1, min(max(3, -(-COLD // codes)), MEMORY // (case.dense_bytes + codes)))


def step_count(layers: int) -> int:
    """Steps of each layer: at least 2, so that hints are never those of the same query, and CALLS calls in all."""
    return max(2, -(-CALLS // layers))


def make_layer(
    case: Case, bits: int, *, steps: int, clustered: bool, seed: int, device: torch.device, planes: int = 1
) -> GpuLayer:
    """A layer of random keys.

    Args:
        steps: queries to make.
        planes: of a query, as an encoder makes them of normal projections; the last one holds its signs.
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

    def in_planes(signs: Tensor) -> Tensor:  # [..., W] -> [..., planes, W]
        if planes == 1:
            return signs.unsqueeze(-2)
        query = query_planes(normal(*signs.shape[:-1], bits).float(), planes)
        return query ^ query[..., -1:, :] ^ signs.unsqueeze(-2)  # the complement is the query of the opposite sign

    codes = random_bits(*kv, case.keys, words)
    queries = [random_bits(*kv, group, words) for _ in range(steps)]
    if clustered:
        centre = random_bits(*kv, 1, words)
        first, width = case.keys // 2, max(1, case.keys // 64)
        codes[:, :, first : first + width] = centre ^ few_bits(*kv, width, words)
        queries = [centre ^ few_bits(*kv, group, words) for _ in range(steps)]
    q = [normal(case.batch, case.q_heads, 1, case.head_dim) for _ in range(steps)]
    query = [in_planes(query).view(case.batch, case.q_heads, 1, planes, words) for query in queries]
    keys, values = (normal(*kv, case.keys, case.head_dim) for _ in range(2))
    starts = torch.zeros(case.batch, dtype=torch.int32, device=device)
    length = torch.tensor([case.keys], dtype=torch.int32, device=device)
    return GpuLayer(q, query, keys, values, codes, starts, length)


def with_signs(layer: GpuLayer) -> GpuLayer:
    """The same keys for queries of one plane, the signs."""
    return replace(layer, query=[query[..., -1:, :].contiguous() for query in layer.query])


def with_estimate(layer: GpuLayer) -> GpuLayer:
    """The same with norms of its keys about a random centre. The random estimates are about as large as the logits."""
    keys = layer.keys
    centre = torch.randn(keys.shape[0], keys.shape[1], keys.shape[3], device=keys.device)
    norms = torch.stack([(own.float() - c.unsqueeze(1)).norm(dim=-1) for own, c in zip(keys, centre, strict=True)])
    a = torch.full((1,), 0.1, device=keys.device)
    return replace(layer, estimate=Estimate(norms.bfloat16().unsqueeze(-1), centre, a, 64 * layer.codes.shape[-1]))


def with_before(layer: GpuLayer, k: int) -> GpuLayer:
    """The same after a layer that kept k random keys for each query head, a quarter of them the same for all heads."""
    q, keys = layer.q[0], layer.keys.shape[2]
    g = torch.Generator(q.device).manual_seed(k)
    order = torch.rand(*q.shape[:3], keys, generator=g, device=q.device)
    order[..., : k // 4] = 0
    ids = order.topk(k, largest=False).indices.sort(-1).values.to(torch.int32)
    logits = torch.randn(*q.shape[:3], k, generator=g, device=q.device)
    return replace(layer, before=Before(ids, logits.softmax(-1)))
