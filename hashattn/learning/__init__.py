"""Learning encoders from a model: capturing its queries and keys, fitting to them."""

from hashattn.learning.capture import capture
from hashattn.learning.fit import fit_layers
from hashattn.learning.plan import Plan
from hashattn.learning.recipe import Recipe
from hashattn.learning.shards import Shards

__all__ = ["Plan", "Recipe", "Shards", "capture", "fit_layers"]
