"""Random numbers that are a function of a place, so that a sample can be drawn again."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = (1 << 32) - 1


def draws(seed: int, *places: int | Tensor) -> Tensor:
    """Numbers from 0 to 2^31 - 1, int64, of the places' broadcast shape: the same for the same seed and places.

    A counter-based generator: no state, any device, any order. The mixing is "lowbias32" of Wellons' Hash Prospector.
    """
    h = torch.tensor(seed & _LOW)
    for place in (0, *places):
        here = place if isinstance(place, Tensor) else torch.tensor(place)
        h = _mix((h.to(here.device) + here.long() * 0x9E3779B9) & _LOW)
    return h >> 1


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW  # int64 wraps around, which the low 32 bits do not notice
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
