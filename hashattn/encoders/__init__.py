"""Encoders: how keys and queries become codes."""

from hashattn.encoders.alsh import L2ALSH, SimpleLSH
from hashattn.encoders.asymmetric import AsymmetricHash
from hashattn.encoders.base import Encoder
from hashattn.encoders.centring import Centring
from hashattn.encoders.cross_polytope import CrossPolytope
from hashattn.encoders.heavy_channels import HeavyChannels
from hashattn.encoders.identity import Identity
from hashattn.encoders.itq import ITQ
from hashattn.encoders.pca import PCA
from hashattn.encoders.per_layer import PerLayer
from hashattn.encoders.pq import PQ
from hashattn.encoders.rabitq import RaBitQ
from hashattn.encoders.simhash import SimHash
from hashattn.encoders.spectral import SpectralHash
from hashattn.encoders.symmetric import SymmetricHash

__all__ = [
    "ITQ",
    "L2ALSH",
    "PCA",
    "PQ",
    "AsymmetricHash",
    "Centring",
    "CrossPolytope",
    "Encoder",
    "HeavyChannels",
    "Identity",
    "PerLayer",
    "RaBitQ",
    "SimHash",
    "SimpleLSH",
    "SpectralHash",
    "SymmetricHash",
]
