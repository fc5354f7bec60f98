"""Every part keeps the contract that hashattn.testing states; none is forgotten."""

import pytest
from torch import nn

from hashattn import PRESETS, Attend, Encoder, Index, MixedPrecision, PerLayer, PerLayerAttend, Selector
from hashattn.encoders.learned import LearnedHash
from hashattn.testing import check_attend, check_encoder, check_index, check_preset, check_selector
from hashattn.testing.inputs import Shape
from tests.contract.parts import ATTENDS, ENCODERS, INDEXES, SELECTORS, covered, exported


def test_no_part_is_forgotten():
    assert covered(ENCODERS) == exported(Encoder, "PerLayer")
    assert covered(INDEXES) == exported(Index)
    assert covered(SELECTORS) == exported(Selector)
    assert covered(ATTENDS) == exported(Attend, "PerLayerAttend")


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    check_encoder(ENCODERS[name]())


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(name):
    index, encoder = INDEXES[name]
    check_index(index, encoder(), approximate=name.endswith("graph"))


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors(name):
    selector, whole, options = SELECTORS[name]
    check_selector(selector, whole=whole, **options)


@pytest.mark.parametrize("name", ATTENDS)
def test_attends(name):
    make, options = ATTENDS[name]
    check_attend(make(), **options)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    learned = isinstance(PRESETS[name]().encoder, LearnedHash)
    smaller = {"cells": 4} if name == "faiss_ivf" else {}  # it is fitted to 39 keys a cell
    check_preset(PRESETS[name], fitting={"steps": 2} if learned else {}, **smaller)


def test_what_holds_a_part_for_each_layer_hands_it_out():
    encoder, stage = ENCODERS["ITQ"](), MixedPrecision()
    assert PerLayer({3: encoder}).layer(3) is encoder
    assert PerLayerAttend({3: stage}).layer(3) is stage


ODD = [Shape(3, 1, 33, start=5), Shape(2, 2, 16, start=64)]  # one KV head for all; no groups, and much padding
PLAIN = [name for name, make in ENCODERS.items() if not isinstance(make(), nn.Module)]


@pytest.mark.parametrize("shape", ODD, ids=repr)
def test_other_shapes(shape):
    for name in PLAIN:
        check_encoder(ENCODERS[name](), shape=shape)
    for index, make in (INDEXES[name] for name in ("FaissBinary", "MultiProbe", "Pages", "Channels")):
        check_index(index, make(), shape=shape)
    for name in ("Consensus", "Refine", "Threshold, votes", "TopK, union", "TopP", "RandomTail"):
        selector, whole, options = SELECTORS[name]
        check_selector(selector, whole=whole, **{**options, "shape": shape})
    for make, options in ATTENDS.values():
        check_attend(make(), shape=shape, **options)
