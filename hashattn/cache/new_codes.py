"""new_codes: what a cache keeps of keys that it has not encoded yet."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.cache.centres import Centres
from hashattn.encoders.base import Encoder
from hashattn.ops import decode
from hashattn.ops.decode.estimate import key_norms


def new_codes(encoder: Encoder, k: Tensor, centres: Centres, norms: bool) -> tuple[Tensor, Tensor | None]:
    """Codes of keys [B, Hkv, n, D], and their norms if these are kept: in one kernel where one serves them.

    Returns:
        Codes as encoder.encode_key() makes them; bfloat16 [B, Hkv, n, 1] or None, with the gradients of the keys.
    """
    centre = centres.subtracted
    if decode.encodes_many(k, encoder.widths()):
        encoder.warn_unfitted()
        by = encoder.maps(k.shape[3], k.device)[1]
        centre = None if centre is None else centre.float().contiguous()
        return decode.kernels_on(k.device).encode_many(k, centre, by, norms)
    with torch.no_grad():
        codes = encoder.encode_key(k, centres.frozen)
    return codes, key_norms(k, centre) if norms else None
