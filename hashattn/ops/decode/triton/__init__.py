"""The decode step in Triton, for GPUs and rules that CUDA C++ does not serve. Triton is imported where it is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode.inputs import Inputs, Newest, Placed, Stored
from hashattn.ops.decode.kernels import Decode, Encode, EncodePlaced, Kernels
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.request import KernelRequest, why_not_binary


class InTriton(Kernels):
    """Exact top-k and LocalTopK in two kernels, with estimates of medium keys; encoding in up to three."""

    @property
    def language(self) -> str:
        return "Triton"

    @property
    def calibrating(self) -> str:
        return "one kernel that marks keys (vote), one that discounts what is listed (discount_lists)"

    def why_not_on(self, device: torch.device) -> list[str]:
        return []

    def why_not(self, request: KernelRequest) -> list[str]:
        return why_not_binary(request)

    def decode(self, like: Inputs) -> Decode:
        from hashattn.ops.decode.triton.decode import prepare

        return prepare(like)

    def encode(self, like: Newest) -> Encode:
        from hashattn.ops.decode.triton.encode import prepare

        return prepare(like)

    def encode_placed(self, like: Placed) -> EncodePlaced:
        from hashattn.ops.decode.triton.encode import prepare_placed

        return prepare_placed(like)

    def encode_many(self, k: Tensor, centre: Tensor | None, by: Map, norms: bool) -> tuple[Tensor, Tensor | None]:
        from hashattn.ops.decode.triton.encode_many import encode_many

        return encode_many(k, centre, by, norms)

    def append(
        self, k: Tensor, v: Tensor, codes: Tensor, norms: Tensor | None, stored: Stored, arrived: Tensor
    ) -> None:
        from hashattn.ops.decode.triton.append import append

        append(k, v, codes, norms, stored, arrived)
