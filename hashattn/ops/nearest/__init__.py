"""Exact selection of the nearest keys."""

from hashattn.ops.nearest.cpu import nearest_visible
from hashattn.ops.nearest.reference import nearest

__all__ = ["nearest", "nearest_visible"]
