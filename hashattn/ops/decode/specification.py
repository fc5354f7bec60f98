"""Specification: what the kernels compute, on the CPU and in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.ops.decode import encode_reference
from hashattn.ops.decode.families import FAMILIES
from hashattn.ops.decode.inputs import Before, Inputs, Newest, Outputs, Placed, Stored
from hashattn.ops.decode.kernels import Decode, Encode, EncodePlaced, Kernels
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.reference import decode
from hashattn.ops.decode.request import KernelRequest
from hashattn.ops.decode.sizes import Sizes
from hashattn.ops.select.plan import Plan


class Specification(Kernels):
    """In place of kernels where tensors are on the CPU: whoever traces or tests a step there runs it."""

    @property
    def language(self) -> str:
        return "PyTorch"

    @property
    def calibrating(self) -> str:
        return "votes and discounts"

    def why_not_on(self, device: torch.device) -> list[str]:
        return [] if device.type == "cpu" else [f"it runs on the CPU, the tensors are on {device.type}"]

    def why_not(self, request: KernelRequest) -> list[str]:
        known = request.scores == "hamming" or request.scores in FAMILIES
        return [*self.why_not_on(request.device), *([] if known else ["it serves binary codes in a FlatHamming index"])]

    def decode(self, like: Inputs) -> Decode:
        sizes = Plan.of(like) if like.scores in FAMILIES else Sizes.of(like)

        def step(q: Tensor, query: Tensor, scale: float, before: Before | None) -> Outputs:
            length = like.stored.length
            stored = replace(like.stored, length=length.clamp(max=sizes.limit))
            inputs = replace(like, q=q, query=query, scale=scale, stored=stored, rule=sizes.rule, before=before)
            out, lse, ids, tier, weights = decode(inputs)
            out = torch.full_like(out, torch.nan) if int(length) > sizes.limit else out
            more = 0, sizes.slots - ids.shape[-1]
            tier = None if tier is None else F.pad(tier, more)
            weights = None if weights is None else F.pad(weights, more)
            return Outputs(out.contiguous(), lse.contiguous(), F.pad(ids, more, value=-1), tier, weights)

        return step

    def encode(self, like: Newest) -> Encode:
        return lambda q, k, v, first: encode_reference.encode(replace(like, q=q, k=k, v=v), first)

    def encode_placed(self, like: Placed) -> EncodePlaced:
        return lambda q, first, new: encode_reference.encode_placed(like, q, first, new)

    def encode_many(self, k: Tensor, centre: Tensor | None, by: Map, norms: bool) -> tuple[Tensor, Tensor | None]:
        return encode_reference.encode_many(k, centre, by, norms)

    def append(
        self, k: Tensor, v: Tensor, codes: Tensor, norms: Tensor | None, stored: Stored, arrived: Tensor
    ) -> None:
        encode_reference.append(k, v, codes, norms, stored)
