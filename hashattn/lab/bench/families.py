"""What `hashattn bench kinds` measures of scores other than Hamming distances: a composition of each family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hashattn.attend import ExactAttend
from hashattn.encoders import PCA, PQ, Identity, RaBitQ
from hashattn.encoders.base import Encoder
from hashattn.engines.base import Request
from hashattn.engines.fused import POSITIONS, packed
from hashattn.engines.gpu import Gpu
from hashattn.engines.parts import Parts
from hashattn.index import Channels, FlatDot, FlatPQ, FlatRaBitQ, Index, Pages
from hashattn.lab.bench.cases import DTYPES, Case
from hashattn.lab.bench.cuda_inputs import GpuLayer
from hashattn.lab.bench.floors import Machine, Reads, floors
from hashattn.selectors import Recent, Selector, Sink, TopK


@dataclass(frozen=True)
class FamilyKind:
    """A composition over random keys.

    Attributes:
        parts: of it; what is to be fitted is random.
        read: bytes that a step reads of a key to rank it.
    """

    parts: Parts
    read: float

    @property
    def selector(self) -> Selector:
        """Which keys it keeps."""
        assert self.parts.selector is not None
        return self.parts.selector

    def floors(self, case: Case, bits: int, per: str, machine: Machine, read: Reads) -> dict[str, Any]:
        """What it is written in, the bits that it reads of a key, and what it cannot be faster than: its bytes."""
        own = round(8 * self.read)
        described = {"kernels": "Triton", "planes": 1, "bits": own}
        return described | floors(case, own, per, replace(machine, clock=None), read)

    def why_not(self, case: Case) -> str | None:
        """Why the GPU engine does not serve a case, as the end of a sentence; None if it does."""
        shape = case.batch, case.q_heads, case.kv_heads, case.head_dim
        return "; ".join(Gpu().why_not(self.parts, Request(torch.device("cuda"), DTYPES[case.dtype], *shape))) or None

    def of(self, layer: GpuLayer) -> GpuLayer:
        """The same queries and keys with this family's codes."""
        encoder, index, (batch, kv_heads, keys) = self.parts.encoder, self.parts.index, layer.keys.shape[:3]
        query = [packed(self.parts, q, kv_heads) for q in layer.q]
        if encoder is None or index is None:
            return replace(layer, query=query, codes=layer.keys, scores=POSITIONS)
        store = index.new_store(keys)
        store.align([0] * batch)
        store.add(encoder.encode_key(layer.keys))
        return replace(layer, query=query, codes=store._codes.storage, scores=index.scores, page=index.page)


def family_kinds(case: Case, per: str, device: torch.device) -> dict[str, FamilyKind]:
    """What is measured, by name. Codebooks and axes are random: what is measured is cost, not quality."""
    dim, size, topk = case.head_dim, DTYPES[case.dtype].itemsize, TopK(k=case.k, per=per)
    quantiser, components = PQ(16 if dim % 16 == 0 else dim // 8), PCA(dim // 4)
    for encoder in (quantiser, components):
        encoder.prepare(case.kv_heads, dim, device)
    quantiser.codebooks.normal_()
    components.projection.normal_(std=dim**-0.5)

    def kind(encoder: Encoder, index: Index) -> FamilyKind:
        return FamilyKind(Parts(encoder, index, topk, ExactAttend()), index.read_bytes(encoder.code_bytes(dim, size)))

    window = Parts(None, None, Sink(4) | Recent(case.k - 4), ExactAttend())
    return {
        f"PQ, {quantiser.subquantisers} bytes": kind(quantiser, FlatPQ()),
        "RaBitQ": kind(RaBitQ(centring=None), FlatRaBitQ()),
        "Quest, pages of 16": kind(Identity(), Pages(16)),
        f"Loki, {dim // 4} components": kind(components, FlatDot()),
        f"SparQ, {dim // 4} channels": kind(Identity(), Channels(dim // 4)),
        "oracle, exact products": kind(Identity(), FlatDot()),
        "streaming, sinks and a window": FamilyKind(window, 0.0),
    }
