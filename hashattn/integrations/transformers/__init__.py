"""Hugging Face transformers: a preset attached to a causal language model.

Supported: transformers >= 5.17, < 6; decoder models that use the attention interface; dynamic and static caches.
"""

from hashattn.integrations.attached.report import Report
from hashattn.integrations.transformers.attach import Handle, attach
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.capture import Captured, capture, tapped
from hashattn.integrations.transformers.hooks import detach
from hashattn.integrations.transformers.model_facts import facts_of
from hashattn.integrations.transformers.static_layer import HashedStaticLayer

__all__ = [
    "Captured",
    "Handle",
    "HashedLayer",
    "HashedStaticLayer",
    "Report",
    "attach",
    "capture",
    "detach",
    "facts_of",
    "tapped",
]
