"""Indexes: where codes are kept and how they are scanned."""

from hashattn.index.base import Index, Store
from hashattn.index.flat_buckets import FlatBuckets
from hashattn.index.flat_dot import FlatDot
from hashattn.index.flat_hamming import FlatHamming
from hashattn.index.flat_rabitq import FlatRaBitQ

__all__ = ["FlatBuckets", "FlatDot", "FlatHamming", "FlatRaBitQ", "Index", "Store"]
