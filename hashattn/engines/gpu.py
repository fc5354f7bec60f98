"""Gpu: a fused decode step on an NVIDIA GPU, in CUDA C++ where that compiles and in Triton where it does not."""

from __future__ import annotations

import torch

from hashattn.core.naming import short
from hashattn.encoders.base import Encoder
from hashattn.engines.base import Engine, PlanRow, PreparedStep, Request, part_name, selector_name
from hashattn.engines.fused import FusedStep, asked_of
from hashattn.engines.gathered import Gathered, why_not_gathered
from hashattn.engines.gpus import this_gpu
from hashattn.engines.parts import Parts
from hashattn.ops import decode


class Gpu(Engine):
    """Scan, choice and attention in two kernels, two more between them where distances are calibrated; in three kernels
    for scores of other families.

    What a call asks beyond that, the reference does.
    """

    name, device = "gpu", "cuda"
    captures = True

    def why_not(self, parts: Parts, request: Request) -> list[str]:
        encoder, selector = parts.encoder, parts.selector
        if selector is None:
            return ["it serves compositions that select keys"]
        reasons = []
        if encoder is not None and encoder.code_heads(request.kv_heads) != request.kv_heads:
            reasons.append("it serves one code a key, not one for each query head")
        if not parts.attend.fused:
            reasons.append(
                f"it attends as ExactAttend does, or MixedPrecision without a residual, not as {short(parts.attend)}"
            )
        asked = asked_of(parts, request)
        if asked is None and parts.encoder is None and not reasons:
            return why_not_gathered(parts, request)
        if asked is None:
            serves = 'TopK, LocalTopK, Threshold and Tiers (of a group, with combine="sum"), Sink and Recent'
            around = "Consensus and Momentum around them"
            return [*reasons, f"it serves {serves}, and {around}, not {short(selector)}"]
        return [*reasons, *decode.why_not(asked)]

    def prepare(self, parts: Parts, request: Request) -> PreparedStep:
        return FusedStep(parts, request) if asked_of(parts, request) is not None else Gathered(parts, request)

    def crossover(self, parts: Parts, request: Request) -> int | None:
        found = this_gpu(request.device)
        return None if found is None else found[1].keys(request.key_bytes, request.captured, *kind_of(parts, request))

    def measured(self, parts: Parts, request: Request) -> str:
        found = this_gpu(request.device)
        if found is None:
            return ""
        name, gpu = found
        captured = gpu.keys(request.key_bytes, True, *kind_of(parts, request))
        if captured is None:
            return ""
        return f"{name}, {gpu.source}; in a CUDA graph a step wins from {captured:,} keys on"

    def rows(self, parts: Parts, request: Request) -> list[PlanRow]:
        asked = asked_of(parts, request)
        if asked is None:
            chosen = PlanRow("select", f"{selector_name(parts.selector)}: PyTorch", "by what past queries attended to")
            attend = f"{part_name(parts.attend)}: Triton, one kernel (attend_ids)"
            return [chosen, PlanRow("attend", attend, "split over the selected keys")]
        kernels, slower = decode.served_by(asked)
        language, chunks = kernels.language, asked.rule.chunks is not None
        listed = "keeps the nearest of each chunk" if chunks else "lists the keys near the last step's threshold"
        listed = "; ".join([listed, *slower])
        one = "the same kernel" if chunks and not slower else "one kernel"
        selector, exact = selector_name(parts.selector), "exact, ties to the most recent key"
        attending = PlanRow("attend", f"{part_name(parts.attend)}: {language}", "split over the selected keys")
        if parts.encoder is None:
            return [PlanRow("select", f"{selector}: {language}, one kernel (list_forced)", "by position"), attending]
        if not decode.is_binary(asked):
            return [
                PlanRow("encode", f"{part_name(parts.encoder)}: PyTorch", "one token's query and key"),
                PlanRow("scan", f"{part_name(parts.index)}: {language}, one kernel (scan)", "a rank a key and choice"),
                PlanRow("select", f"{selector}: {language}, one kernel (choose)", exact),
                attending,
            ]
        if asked.rule.calibrated:
            one = f"{kernels.calibrating}, {one}"
        return [
            _encode_row(parts.encoder, request.device),
            PlanRow("scan", f"{part_name(parts.index)}: {language}, one kernel", listed),
            PlanRow("select", f"{selector}: {language}, {one} with attend", exact),
            attending,
        ]


def kind_of(parts: Parts, request: Request) -> tuple[bool, str]:
    """(whether a step that is served calibrates its distances, the family of its scores)."""
    asked = asked_of(parts, request)
    return (False, "hamming") if asked is None else (asked.rule.calibrated, asked.scores)


def _encode_row(encoder: Encoder, device: torch.device) -> PlanRow:
    reasons = decode.why_not_encode(encoder.widths())
    if reasons:
        return PlanRow("encode", f"{part_name(encoder)}: PyTorch", "; ".join(reasons))
    part = f"{part_name(encoder)}: {decode.kernels_on(device).language}, one kernel"
    return PlanRow("encode", part, "queries and the newest keys; append=(k, v) and decoders append in it as well")
