"""Learning encoders from a model: capturing its queries and keys, fitting to them."""

from hashattn.learning.capture import capture
from hashattn.learning.plan import Plan
from hashattn.learning.shards import Shards

__all__ = ["Plan", "Shards", "capture"]
