"""InTriton for the other families of scores: ranks of all keys, one exact choice, attention to what was chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode.families import FAMILIES
from hashattn.ops.decode.inputs import Inputs, Newest, Placed, Stored
from hashattn.ops.decode.kernels import Decode, Encode, EncodePlaced, Kernels
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.request import KernelRequest, why_not_here, why_not_shape
from hashattn.ops.decode.sizes import too_many


class Scored(Kernels):
    """Top-k and thresholds over the scores of FAMILIES, in three kernels. PyTorch encodes."""

    @property
    def language(self) -> str:
        return "Triton"

    @property
    def calibrating(self) -> str:
        return "nothing: no rule of theirs calibrates"

    def why_not_on(self, device: torch.device) -> list[str]:
        return []

    def why_not(self, request: KernelRequest) -> list[str]:
        reasons, family = why_not_here(request), FAMILIES.get(request.scores)
        if reasons or family is None:
            return reasons or [f"it serves scores of {', '.join(FAMILIES)}, not {request.scores}"]
        reasons = why_not_shape(request)
        rule = request.rule
        if rule.chunks is not None or rule.critical is not None or rule.calibrated:
            reasons.append("of scores other than Hamming distances it serves TopK and Threshold, exactly attended to")
        sizes = request.batch, request.q_heads, request.tokens, request.room, 1, rule
        return [*reasons, *family.why_not(request), *too_many(*sizes)]

    def decode(self, like: Inputs) -> Decode:
        from hashattn.ops.select.prepare import prepare

        return prepare(like, FAMILIES[like.scores].in_triton(like))

    def encode(self, like: Newest) -> Encode:
        raise ValueError("codes of these families are made in PyTorch")

    def encode_placed(self, like: Placed) -> EncodePlaced:
        raise ValueError("codes of these families are made in PyTorch")

    def encode_many(self, k: Tensor, centre: Tensor | None, by: Map, norms: bool) -> tuple[Tensor, Tensor | None]:
        raise ValueError("codes of these families are made in PyTorch")

    def append(
        self, k: Tensor, v: Tensor, codes: Tensor, norms: Tensor | None, stored: Stored, arrived: Tensor
    ) -> None:
        from hashattn.ops.decode.triton.append import append

        append(k, v, codes, norms, stored, arrived)
