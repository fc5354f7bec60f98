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
    PQ,
    AsymmetricHash,
    Centring,
    CrossPolytope,
    Encoder,
    HeavyChannels,
    Identity,
    PerLayer,
    RaBitQ,
    SimHash,
    SimpleLSH,
    SpectralHash,
    SymmetricHash,
)
from hashattn.facts import ModelFacts
from hashattn.index import (
    Channels,
    FaissBinary,
    FlatBuckets,
    FlatDot,
    FlatHamming,
    FlatPQ,
    FlatRaBitQ,
    Index,
    MultiProbe,
    Pages,
)
from hashattn.presets import PRESETS
from hashattn.saving import Pretrained, from_pretrained, save_pretrained, shipped
from hashattn.selectors import Consensus, LocalTopK, Momentum, Recent, Selector, Sink, Threshold, Tiers, TopK
from hashattn.types import Output, Selection, Step

__version__ = "0.1.0"

__all__ = [
    "ITQ",
    "L2ALSH",
    "PCA",
    "PQ",
    "PRESETS",
    "AsymmetricHash",
    "Attend",
    "Calibration",
    "Centring",
    "Channels",
    "Consensus",
    "CrossPolytope",
    "Decoder",
    "DenseAttend",
    "Encoder",
    "ExactAttend",
    "FaissBinary",
    "FlatBuckets",
    "FlatDot",
    "FlatHamming",
    "FlatPQ",
    "FlatRaBitQ",
    "HashAttention",
    "HeavyChannels",
    "Identity",
    "Index",
    "KVCache",
    "LocalTopK",
    "MixedPrecision",
    "ModelFacts",
    "Momentum",
    "MultiProbe",
    "Output",
    "Pages",
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
