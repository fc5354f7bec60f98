"""Attend stages: the softmax over what was found."""

from hashattn.attend.base import Attend
from hashattn.attend.dense import DenseAttend
from hashattn.attend.exact import ExactAttend
from hashattn.attend.merge import merge
from hashattn.attend.mixed import MixedPrecision
from hashattn.attend.per_layer import PerLayerAttend
from hashattn.attend.sampled import SampledAttend

__all__ = ["Attend", "DenseAttend", "ExactAttend", "MixedPrecision", "PerLayerAttend", "SampledAttend", "merge"]
