"""What every family finds among a real model's keys: the observed recall beside each floor.

Layer 19 of SmolLM2-135M-Instruct over 1,536 tokens of Shakespeare, the last 64 queries; encoders are fitted to another
stretch of it. Recall is the share of a query's 8 keys of largest q.k that a budget of 32 (2%) holds.
"""

import copy

import pytest

from hashattn.integrations.transformers import capture
from hashattn.lab.workload.texts import read_text, windows
from tests.contract.test_recall import FAMILIES, recall
from tests.structured import Cones

LAYER = 19
FLOORS = {
    "exact products": 1.0,  # 1.000
    "SimHash": 0.63,  # .665
    "SimHash, query of 8 planes": 0.76,  # .791
    "SpectralHash": 0.29,  # .321
    "SimpleLSH": 0.66,  # .693
    "L2ALSH": 0.17,  # .208
    "CrossPolytope": 0.21,  # .249
    "RaBitQ of 32 bits": 0.6,  # .635
    "RaBitQ of 128 bits": 0.79,  # .823
    "PQ of 12 bits": 0.49,  # .520
    "PQ of 32 bits": 0.68,  # .715
    "PQ of 128 bits": 0.94,  # .977
    "PCA to 16": 0.69,  # .725
    "HeavyChannels, 8": 0.58,  # .613
    "HeavyChannels, 16": 0.75,  # .789
    "Pages of 4": 0.84,  # .871
    "Pages of 16": 0.58,  # .614
    "Channels, 8": 0.81,  # .843
    "Channels, 16": 0.95,  # .984
    "MultiProbe": 0.59,  # .630
    "FAISS, flat": 0.63,  # .665
    "FAISS, cells": 0.47,  # .507
    "FAISS, graph": 0.54,  # .578
    "FAISS, hashes": 0.19,  # .224
    "LocalTopK": 0.73,  # .768
    "TopK of a group": 0.68,  # .720
    "Refine": 0.94,  # .974
}


@pytest.fixture(scope="session")
def captured(smollm2):
    model, tokenizer = smollm2
    found = []
    for begin, end in ((0.1, 0.3), (0.6, 0.8)):
        (ids,) = windows(tokenizer, read_text(None).share(begin, end), 1536, 1, seed=0)
        found.append(capture(model, ids, layers=[LAYER], queries=64)[LAYER])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_recall_on_real_queries_and_keys_stays_above_its_floor(captured, family):
    other, own = captured
    encoder, index, selector, _ = FAMILIES[family]
    encoder = copy.deepcopy(encoder)
    if hasattr(encoder, "fit"):
        encoder.fit(other.q, other.k)
    exact = own.q.double() @ own.k.double().repeat_interleave(3, 1).transpose(-1, -2)
    data = Cones(own.q, own.k, own.v, exact.topk(8, -1).indices)
    assert recall(encoder, index, selector, data) >= FLOORS[family]
