"""The decode step in CUDA C++, compiled when it is first needed: faster than Triton's, for the GPUs that it serves."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.inputs import Inputs, Newest, Placed, Stored
from hashattn.ops.decode.kernels import Decode, Encode, EncodePlaced, Kernels
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.request import KernelRequest, why_not_binary

OLDEST = (8, 0)  # compute capability
MOST_SPAN = 20  # of 32 levels of candidates


class InCuda(Kernels):
    """Exact top-k in two kernels, three where distances are calibrated, LocalTopK in one, encoding in one."""

    @property
    def language(self) -> str:
        return "CUDA C++"

    @property
    def calibrating(self) -> str:
        return "one kernel that counts votes and discounts what is listed (calibrate)"

    def why_not_on(self, device: torch.device) -> list[str]:
        there = device.type == "cuda" and torch.cuda.is_available()  # a plan may be of a GPU that is not there
        if there and torch.cuda.get_device_capability(device) < OLDEST:
            return ["CUDA C++ is written for compute capability 8.0 and above"]
        reason = compiler.why_not()
        if reason is None and there:
            reason = compiler.why_not_on(torch.cuda.current_device() if device.index is None else device.index)
        return [] if reason is None else [reason]

    def why_not(self, request: KernelRequest) -> list[str]:
        reasons = why_not_binary(request)
        summed = request.group if request.rule.shared else 1
        span = summed * sum(map(abs, request.rule.discounts)) // (2 - summed * (2**request.planes - 1) % 2)
        if span > MOST_SPAN:
            reasons.append(f"discounts of more than {MOST_SPAN} together are told apart in Triton")
        return reasons or self.why_not_on(request.device)  # which compiles a kernel to find out

    def decode(self, like: Inputs) -> Decode:
        from hashattn.ops.decode.cuda.decode import Prepared

        return Prepared(like)

    def encode(self, like: Newest) -> Encode:
        from hashattn.ops.decode.cuda.encode import Prepared

        return Prepared(like)

    def encode_placed(self, like: Placed) -> EncodePlaced:
        from hashattn.ops.decode.cuda.encode import PreparedPlaced

        return PreparedPlaced(like)

    def encode_many(self, k: Tensor, centre: Tensor | None, by: Map, norms: bool) -> tuple[Tensor, Tensor | None]:
        from hashattn.ops.decode.cuda.encode_many import encode_many

        return encode_many(k, centre, by, norms)

    def append(
        self, k: Tensor, v: Tensor, codes: Tensor, norms: Tensor | None, stored: Stored, arrived: Tensor
    ) -> None:
        from hashattn.ops.decode.triton.append import append

        append(k, v, codes, norms, stored, arrived)
