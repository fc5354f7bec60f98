"""Hashed layers do what transformers' own tests ask of a cache's layers."""

import pytest
import torch
from transformers import LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from hashattn.integrations.transformers.caches import hashed_layer
from hashattn.ops.decode import Scratch
from tests.integrations.models import EVERYTHING, SMALL


def filled(layer, rows=3, tokens=20):
    kv = torch.randn(rows, 2, tokens, 16, generator=torch.Generator().manual_seed(0))
    layer.update(kv, kv + 1)
    return layer


@pytest.mark.parametrize(
    "rows",
    [(0, 2), [2, 0], [-1], torch.tensor([1, 1]), [True, False, True], torch.tensor([False, True, True])],
    ids=["tuple", "list", "negative", "tensor", "mask as a list", "mask"],
)
def test_rows_are_picked_as_a_plain_layer_picks_them(rows):
    plain = filled(DynamicLayer())
    ours = hashed_layer(filled(DynamicLayer()), EVERYTHING, Scratch())
    plain.batch_select_indices(torch.as_tensor(rows))
    ours.batch_select_indices(rows)
    assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)
    assert torch.equal(ours.kv.codes, ours.kv.encoder.encode_key(ours.keys, ours.kv.centre))


def test_rows_that_are_not_there_are_refused():
    ours = hashed_layer(filled(DynamicLayer()), EVERYTHING, Scratch())
    for rows in ((0, 3), [-4], torch.tensor([5])):
        with pytest.raises((IndexError, ValueError)):
            ours.batch_select_indices(rows)
    assert ours.kv.batch == 3


def test_a_static_layer_shows_all_its_columns_and_refuses_more_as_a_plain_one_does():
    plain = StaticCache(config=LlamaConfig(**SMALL), max_cache_len=24).layers[0]
    assert type(plain) is StaticLayer
    ours = hashed_layer(filled(StaticLayer(max_cache_len=24)), EVERYTHING, Scratch())
    filled(plain)
    for _ in range(2):
        assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)
        assert ours.keys.shape[2] == ours.get_max_length() == 24
        assert int(ours.get_seq_length()) == int(plain.get_seq_length())
        filled(ours, tokens=2)
        filled(plain, tokens=2)
    more = torch.zeros(3, 2, 1, 16)
    for layer in (plain, ours):
        with pytest.raises(IndexError):
            layer.update(more, more)
    assert len(ours.kv) == 24
