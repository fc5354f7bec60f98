"""Learning encoders from a model: capturing its queries and keys, fitting to them."""

from hashattn.lab.learning.capture import capture
from hashattn.lab.learning.fit import fit_layers
from hashattn.lab.learning.plan import Plan
from hashattn.lab.learning.recipe import Recipe
from hashattn.lab.learning.shards import Shards

__all__ = ["Plan", "Recipe", "Shards", "capture", "fit_layers"]
