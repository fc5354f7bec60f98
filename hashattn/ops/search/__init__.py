"""Scan and selection in one pass over the codes, without a matrix of distances."""

from hashattn.ops.search.cpu import search
from hashattn.ops.search.ranking import Ranking
from hashattn.ops.search.reference import search as reference

__all__ = ["Ranking", "reference", "search"]
