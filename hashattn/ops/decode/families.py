"""FAMILIES: the scores that one pipeline of kernels serves. Another one is a folder beside these, and a line here."""

from __future__ import annotations

from hashattn.ops.adc.family import Adc
from hashattn.ops.bounds.family import Bounds
from hashattn.ops.positions.family import Positions
from hashattn.ops.products.family import Products
from hashattn.ops.rabitq.family import RaBitQ
from hashattn.ops.select.family import Family

FAMILIES: dict[str, Family] = {
    each.scores: each for each in (Adc(), Bounds(), RaBitQ(), Products("dot"), Products("channels"), Positions())
}
