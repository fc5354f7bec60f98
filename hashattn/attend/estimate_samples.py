"""What the estimates of medium keys' logits are fitted to: the keys nearest to some queries by code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hashattn.core.kinds import MakesCodes
from hashattn.ops.hamming import distances, unpack_bits


@dataclass(frozen=True, eq=False)
class EstimateSamples:
    """The keys nearest to some queries by code, and what their estimates are made of.

    Attributes:
        true: their logits, float32 [B, Hq, T, K]; -inf where a slot is empty.
        offset: what the centre contributes, [B, Hq, T, 1].
        size: |q| |k - c| in units of the logits, [B, Hq, T, K].
        agreement: of the codes, -1 to 1, [B, Hq, T, K].
        h_q, codes: sign vectors of the queries [B, Hq, T, bits], packed codes of the keys [B, Hq, T, K, W].
        medium, seen: bool [B, Hq, T, K], which are estimated, and which are there.
        bits: length of a code.
    """

    true: Tensor
    offset: Tensor
    size: Tensor
    agreement: Tensor
    h_q: Tensor
    codes: Tensor
    medium: Tensor
    seen: Tensor
    bits: int

    def part(self, row: int, queries: Tensor) -> EstimateSamples:
        """Some queries of a batch row: [Hq, t, ...]."""
        names = ("true", "offset", "size", "agreement", "h_q", "codes", "medium", "seen")
        return replace(self, **{name: getattr(self, name)[row][:, queries] for name in names})


@torch.no_grad()
def nearest_of(
    q: Tensor, k: Tensor, encoder: MakesCodes, positions: Tensor | None, critical: float, share: float, scale: float
) -> EstimateSamples:
    """What MixedPrecision.fit looks at; its arguments are described there."""
    rows, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    if positions is None:
        positions = torch.arange(keys - tokens, keys, device=k.device).expand(rows, -1)
    found_centre = encoder.centre_of(k)
    centre = torch.zeros_like(k[:, :, 0]).float() if found_centre is None else found_centre
    query, codes = encoder.encode_query(q), encoder.encode_key(k, centre)
    signs = query if query.ndim == 4 else query[..., -1, :]
    group, own = q.shape[1] // k.shape[1], q.shape[1] // codes.shape[1]
    visible = (positions + 1)[:, None, :, None]  # [B, 1, T, 1]
    away = distances(signs, codes).masked_fill(torch.arange(keys, device=k.device) >= visible, encoder.bits + 1)
    slots = max(2, math.ceil(share * int(visible.max())))
    ids = away.topk(min(slots, keys), dim=-1, largest=False).indices  # [B, Hq, T, K]
    place = torch.arange(ids.shape[-1], device=k.device)
    seen = (place < (visible * share).ceil()) & (ids < visible)
    medium = seen & (place >= (visible * critical).ceil())

    def gathered(x: Tensor, repeats: int) -> Tensor:  # [B, H, N, X] -> [B, Hq, T, K, X]
        x = x.repeat_interleave(repeats, dim=1)
        chosen = ids.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, chosen).view(*ids.shape, -1)

    found, h_k = gathered(k.float(), group), gathered(codes, own)
    centres, queries = centre.repeat_interleave(group, dim=1)[:, :, None], q.float()  # [B, Hq, 1, D]
    offset = (queries * centres).sum(-1, keepdim=True) * scale
    size = queries.norm(dim=-1, keepdim=True) * (found - centres.unsqueeze(3)).norm(dim=-1) * scale
    true = ((queries.unsqueeze(-2) * found).sum(-1) * scale).masked_fill(~seen, -torch.inf)
    h_q = unpack_bits(signs, encoder.bits).float() * 2 - 1
    agreement = 1 - 2 * away.gather(-1, ids).float() / encoder.bits
    return EstimateSamples(
        true, offset, size, agreement, h_q, h_k, medium.expand_as(true), seen.expand_as(true), encoder.bits
    )
