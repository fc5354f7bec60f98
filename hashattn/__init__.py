"""hashattn: attention as an index problem.

Keys are encoded and indexed once, each query searches them, and the softmax runs over what was found.
"""

from hashattn.attend import Attend, DenseAttend, ExactAttend, MixedPrecision, PerLayerAttend, SampledAttend, merge
from hashattn.attention import HashAttention
from hashattn.cache import KVCache
from hashattn.calibration import Calibration
from hashattn.decoder import Decoder
from hashattn.encoders import (
    ITQ,
    PQ,
    AsymmetricHash,
    Centring,
    Encoder,
    HeavyChannels,
    Identity,
    PerLayer,
    SimHash,
    SymmetricHash,
)
from hashattn.facts import ModelFacts
from hashattn.index import Channels, FaissBinary, FlatDot, FlatHamming, FlatPQ, Index, MultiProbe, Pages
from hashattn.presets import PRESETS
from hashattn.saving import Pretrained, from_pretrained, save_pretrained, shipped
from hashattn.selectors import (
    CollisionSample,
    Consensus,
    HeavyHitters,
    LocalTopK,
    LogitMap,
    Momentum,
    ObservationWindow,
    RandomTail,
    Recent,
    Refine,
    Reuse,
    Selector,
    Sink,
    Threshold,
    Tiers,
    TopK,
    TopP,
    pyramid,
)
from hashattn.types import Output, Selection, Step

__version__ = "0.1.0"

__all__ = [
    "ITQ",
    "PQ",
    "PRESETS",
    "AsymmetricHash",
    "Attend",
    "Calibration",
    "Centring",
    "Channels",
    "CollisionSample",
    "Consensus",
    "Decoder",
    "DenseAttend",
    "Encoder",
    "ExactAttend",
    "FaissBinary",
    "FlatDot",
    "FlatHamming",
    "FlatPQ",
    "HashAttention",
    "HeavyChannels",
    "HeavyHitters",
    "Identity",
    "Index",
    "KVCache",
    "LocalTopK",
    "LogitMap",
    "MixedPrecision",
    "ModelFacts",
    "Momentum",
    "MultiProbe",
    "ObservationWindow",
    "Output",
    "Pages",
    "PerLayer",
    "PerLayerAttend",
    "Pretrained",
    "RandomTail",
    "Recent",
    "Refine",
    "Reuse",
    "SampledAttend",
    "Selection",
    "Selector",
    "SimHash",
    "Sink",
    "Step",
    "SymmetricHash",
    "Threshold",
    "Tiers",
    "TopK",
    "TopP",
    "from_pretrained",
    "merge",
    "pyramid",
    "save_pretrained",
    "shipped",
]
