"""Every part keeps the contract that hashattn.testing states; none is forgotten."""

import pytest

from hashattn import PRESETS, Attend, Encoder, Index, MixedPrecision, PerLayer, PerLayerAttend, Selector
from hashattn.encoders.learned import LearnedHash
from hashattn.testing import check_attend, check_encoder, check_index, check_preset, check_selector
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
