"""Where keys and values live."""

from hashattn.store.base import KVStore
from hashattn.store.resident import Resident

__all__ = ["KVStore", "Resident"]
