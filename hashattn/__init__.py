"""hashattn: attention as an index problem.

Keys are encoded and indexed once, each query searches them, and the softmax runs over what was found.
"""

from torch import nn

from hashattn.attend import Attend, DenseAttend, ExactAttend, MixedPrecision, PerLayerAttend, SampledAttend, merge
from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.model_facts import ModelFacts
from hashattn.core.types import Output, Selection, Step
from hashattn.core.version import __version__ as __version__
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
from hashattn.engines.decoder import Decoder
from hashattn.fitted.calibration import Calibration
from hashattn.fitted.saving import Pretrained, from_pretrained, save_pretrained, shipped
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


def detach(model: nn.Module) -> None:
    """Give a Hugging Face model back as it was before attach(), without the handle of that.

    Raises:
        ValueError: nothing is attached to the model.
    """
    from hashattn.integrations.transformers import detach as give_back  # lazy, as HashAttention.attach is

    give_back(model)


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
    "CollisionSample",
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
    "RaBitQ",
    "RandomTail",
    "Recent",
    "Refine",
    "Reuse",
    "SampledAttend",
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
    "TopP",
    "detach",
    "from_pretrained",
    "merge",
    "pyramid",
    "save_pretrained",
    "shipped",
]
