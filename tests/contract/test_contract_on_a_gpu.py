"""Every part keeps the contract with tensors on a GPU. Run with pytest -m gpu."""

import copy

import pytest
from torch import nn

from hashattn import PRESETS
from hashattn.encoders.learned import LearnedHash
from hashattn.testing import check_attend, check_encoder, check_index, check_preset, check_selector
from hashattn.testing.inputs import Shape
from tests.contract.parts import ATTENDS, ENCODERS, INDEXES, SELECTORS

pytestmark = pytest.mark.gpu
GPU = Shape(device="cuda")


def moved(part):
    """A copy whose weights, if there are any, are on the GPU."""
    return copy.deepcopy(part).cuda() if isinstance(part, nn.Module) else part


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    check_encoder(moved(ENCODERS[name]()), shape=GPU)


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(name):
    index, encoder = INDEXES[name]
    check_index(index, moved(encoder()), approximate=name.endswith("graph"), shape=GPU)


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors(name):
    selector, whole, options = SELECTORS[name]
    shape = Shape(start=options["shape"].start, device="cuda") if "shape" in options else GPU
    check_selector(moved(selector), whole=moved(whole), **{**options, "shape": shape})


@pytest.mark.parametrize("name", ATTENDS)
def test_attends(name):
    make, options = ATTENDS[name]
    check_attend(moved(make()), shape=GPU, **options)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    learned = isinstance(PRESETS[name]().encoder, LearnedHash)
    smaller = {"cells": 4} if name == "faiss_ivf" else {}  # it is fitted to 39 keys a cell
    check_preset(PRESETS[name], fitting={"steps": 2} if learned else {}, shape=GPU, **smaller)
