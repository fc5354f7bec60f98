"""Hugging Face transformers: a preset attached to a causal language model.

Supported: transformers >= 5.17, < 6; decoder models that use the attention interface; the dynamic cache.
"""

from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.capture import Captured, capture
from hashattn.integrations.transformers.handle import Handle, attach
from hashattn.integrations.transformers.report import Report

__all__ = ["Captured", "Handle", "HashedLayer", "Report", "attach", "capture"]
