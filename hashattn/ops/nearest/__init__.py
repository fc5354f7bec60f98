"""Exact selection of the nearest keys."""

from hashattn.ops.nearest.cpu import nearest_visible
from hashattn.ops.nearest.local import most_of_span, nearest_of_chunks
from hashattn.ops.nearest.pooled import nearest_of_pool
from hashattn.ops.nearest.reference import group_total, nearest, within

__all__ = [
    "group_total",
    "most_of_span",
    "nearest",
    "nearest_of_chunks",
    "nearest_of_pool",
    "nearest_visible",
    "within",
]
