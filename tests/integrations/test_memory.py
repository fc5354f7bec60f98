"""Nothing grows with the number of steps but the cache, counted in bytes."""

import gc
import sys

import pytest
import torch
from transformers import DynamicCache

from hashattn import Consensus, FlatHamming, HashAttention, Momentum, Recent, Sink, TopK
from hashattn.ops.scratch import held_bytes
from tests.integrations.models import SHORT, forward, make, prompt

STEPS = 400


def tensor_bytes():
    """Bytes of all live tensors, shared storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def container_bytes():
    """Bytes of all live lists, dicts, objects and what else may hold something."""
    gc.collect()
    return sum(sys.getsizeof(x) for x in gc.get_objects() if type(x) is not torch.UntypedStorage)


@pytest.mark.parametrize(
    "ranked", [Momentum(Consensus(TopK(share=0.05))), TopK(share=0.05, per="kv_head")], ids=["calibrated", "one pass"]
)
def test_steps_leave_nothing_behind_but_their_keys(ranked):
    model = make(num_hidden_layers=2, hidden_size=24, head_dim=8, max_position_embeddings=4096)
    attn = HashAttention(SHORT, FlatHamming(), Sink(2) | Recent(4) | ranked, engine="cpu")
    cache, token, counted = DynamicCache(config=model.config), torch.tensor([[5]]), []
    borrowed = held_bytes()
    with attn.attach(model) as handle:
        forward(model, prompt(1)["input_ids"], cache)
        for step in range(1, STEPS + 1):
            forward(model, token, cache)
            if step % (STEPS // 8) == 0:
                kept = sum(layer.kv.nbytes for layer in cache.layers)
                counted.append((tensor_bytes() - kept, container_bytes(), kept))
        assert [row.sparse for row in handle.report().layers] == [STEPS, STEPS]
        scratch = held_bytes()
        cache.crop(-40)
        for _ in range(40):
            forward(model, token, cache)
        assert held_bytes() == scratch  # it follows the length of the cache, not the number of steps
    (others, _, kept), *_, (others_later, _, kept_later) = counted
    assert kept_later > 3 * kept
    assert scratch - borrowed < 0.5 * kept_later
    assert others_later - others < 0.01 * kept_later  # the last selection, 5% of the keys
    later = [objects for _, objects, _ in counted]
    grown = [later[i + 2] - later[i] for i in range(len(later) - 2)]
    assert min(grown) < 400, grown  # a pointer a step would be 800; a table that any module makes larger falls in two
