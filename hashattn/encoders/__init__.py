"""Encoders: how keys and queries become codes."""

from hashattn.encoders.asymmetric import AsymmetricHash
from hashattn.encoders.base import Encoder
from hashattn.encoders.centring import Centring
from hashattn.encoders.heavy_channels import HeavyChannels
from hashattn.encoders.identity import Identity
from hashattn.encoders.itq import ITQ
from hashattn.encoders.per_layer import PerLayer
from hashattn.encoders.pq import PQ
from hashattn.encoders.simhash import SimHash
from hashattn.encoders.symmetric import SymmetricHash

__all__ = [
    "ITQ",
    "PQ",
    "AsymmetricHash",
    "Centring",
    "Encoder",
    "HeavyChannels",
    "Identity",
    "PerLayer",
    "SimHash",
    "SymmetricHash",
]
