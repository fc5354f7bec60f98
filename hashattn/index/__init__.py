"""Indexes: where codes are kept and how they are scanned."""

from hashattn.index.base import Index, Store
from hashattn.index.channels import Channels
from hashattn.index.faiss_binary import FaissBinary
from hashattn.index.flat_dot import FlatDot
from hashattn.index.flat_hamming import FlatHamming
from hashattn.index.flat_pq import FlatPQ
from hashattn.index.multi_probe import MultiProbe
from hashattn.index.pages import Pages

__all__ = ["Channels", "FaissBinary", "FlatDot", "FlatHamming", "FlatPQ", "Index", "MultiProbe", "Pages", "Store"]
