"""Whether the codes in a cache's state are those of a composition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hashattn.encoders.base import Encoder
from hashattn.ops.hamming import popcount


def check_codes(state: Mapping[str, Any], encoder: Encoder | None, norms: bool) -> None:
    """Raise ValueError unless the encoder makes such codes of the first keys.

    Args:
        state: of a KVCache, with codes.
        encoder: the composition's; None if it has no index.
        norms: whether the composition keeps norms.
    """
    if encoder is None:
        raise ValueError("state holds codes, but this composition has no index")
    if norms != ("norms" in state):
        raise ValueError(f"state {'lacks' if norms else 'holds'} norms: it is of another composition")
    codes = state["codes"]
    probe = encoder.encode_key(state["keys"][:, :, : min(64, codes.shape[2])], state.get("centre"))  # some may wait
    if (*codes.shape[:2], codes.shape[3]) != (*probe.shape[:2], probe.shape[3]) or codes.dtype != probe.dtype:
        raise ValueError(
            f"codes {(*codes.shape,)} {codes.dtype} are not of this composition, which makes "
            f"{(*probe.shape[:2], codes.shape[2], probe.shape[3])} {probe.dtype}"
        )
    if not alike(codes[:, :, : probe.shape[2]], probe):
        raise ValueError("codes are not what this composition's encoder makes of the keys: another seed, fit or kind")


def alike(codes: Tensor, probe: Tensor) -> bool:
    """Whether codes are the same but for rounding: of floats, and of bits whose projection lies near zero."""
    if codes.is_floating_point():
        largest = probe.abs().amax(-1, keepdim=True)  # of a product's terms, about
        return bool(((codes - probe).abs() <= 16 * torch.finfo(codes.dtype).eps * largest).all())
    if codes.dtype == torch.uint8:  # numbers of centroids, of which some are as near as others
        return bool((codes == probe).float().mean() >= 0.9)
    return bool(popcount(codes ^ probe).float().mean() <= 3.2)  # of 64; another encoder differs in half of the bits
