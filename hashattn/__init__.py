"""hashattn: attention as an index problem.

Keys are encoded and indexed once, each query searches them, and the softmax runs over what was found.
"""

from hashattn.attend import Attend, DenseAttend, ExactAttend, MixedPrecision, PerLayerAttend, merge
from hashattn.attention import HashAttention
from hashattn.cache import KVCache
from hashattn.calibration import Calibration
from hashattn.decoder import Decoder
from hashattn.encoders import (
    ITQ,
    L2ALSH,
    PCA,
    AsymmetricHash,
    Centring,
    CrossPolytope,
    Encoder,
    Identity,
    PerLayer,
    RaBitQ,
    SimHash,
    SimpleLSH,
    SpectralHash,
    SymmetricHash,
)
from hashattn.facts import ModelFacts
from hashattn.index import FlatBuckets, FlatDot, FlatHamming, FlatRaBitQ, Index
from hashattn.presets import PRESETS
from hashattn.saving import Pretrained, from_pretrained, save_pretrained, shipped
from hashattn.selectors import Consensus, LocalTopK, Momentum, Recent, Selector, Sink, Threshold, Tiers, TopK
from hashattn.types import Output, Selection, Step

__version__ = "0.1.0"

__all__ = [
    "ITQ",
    "L2ALSH",
    "PCA",
    "PRESETS",
    "AsymmetricHash",
    "Attend",
    "Calibration",
    "Centring",
    "Consensus",
    "CrossPolytope",
    "Decoder",
    "DenseAttend",
    "Encoder",
    "ExactAttend",
    "FlatBuckets",
    "FlatDot",
    "FlatHamming",
    "FlatRaBitQ",
    "HashAttention",
    "Identity",
    "Index",
    "KVCache",
    "LocalTopK",
    "MixedPrecision",
    "ModelFacts",
    "Momentum",
    "Output",
    "PerLayer",
    "PerLayerAttend",
    "Pretrained",
    "RaBitQ",
    "Recent",
    "Selection",
    "Selector",
    "SimHash",
    "SimpleLSH",
    "Sink",
    "SpectralHash",
    "Step",
    "SymmetricHash",
    "Threshold",
    "Tiers",
    "TopK",
    "from_pretrained",
    "merge",
    "save_pretrained",
    "shipped",
]
