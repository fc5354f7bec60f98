"""Exact selection of the nearest keys."""

from hashattn.ops.nearest.reference import nearest

__all__ = ["nearest"]
