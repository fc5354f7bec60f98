"""Reports say at how many positions keys were ranked, and how many beyond the forced ones."""

import json

import pytest
import torch
from transformers import DynamicCache

from hashattn import FlatHamming, HashAttention, Recent, Sink, TopK
from tests.integrations.models import SHORT, forward, make, prompt

CENTRED = SHORT.centring.warmup  # positions that see fewer keys than this are dense
FORCED = Sink(4) | Recent(16)


def composed(ranked, **options):
    return HashAttention(SHORT, FlatHamming(), FORCED | ranked, engine="reference", **options)


def simulated(attn, tokens=60):
    model = make()
    ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(0))
    with attn.attach(model, simulate=True) as handle, torch.no_grad():
        model(input_ids=ids, use_cache=False)
        return handle.report()


def test_a_share_below_the_forced_keys_searches_nothing_and_says_so():
    report = simulated(composed(TopK(share=0.1)))
    assert (report.positions, report.searched, report.keys_ranked) == (120, 0, 0.0)
    assert "ranked at 0 of 120 positions: NOTHING WAS SEARCHED" in str(report)
    assert "min_k=" in str(report)
    assert json.loads(report.as_json())["searched"] == 0
    other = simulated(HashAttention(SHORT, FlatHamming(), FORCED, engine="reference"))
    assert other.sparse_keys_read == report.sparse_keys_read  # the same keys as without any ranking


def test_a_floor_is_searched_for_at_every_position_that_has_more_keys():
    report = simulated(composed(TopK(share=0.1, min_k=5)))
    visible = [n for n in range(1, 61) if n >= CENTRED and n > 20]
    assert report.searched == 2 * len(visible)
    assert report.keys_ranked == pytest.approx(sum(min(5, n - 20) for n in visible) / len(visible))
    assert "NOTHING" not in str(report)
    assert f"ranked at {report.searched} of 120 positions, {report.keys_ranked:.1f} a head" in str(report)


def test_layers_tell_theirs():
    report = simulated(composed(TopK(k=30), dense_layers=(0,)))
    assert (report.layers[0].positions, report.layers[0].searched) == (0, 0)
    for row in report.layers[1:]:
        assert (row.positions, row.searched) == (120, report.searched)
        assert 0 < row.keys_ranked <= 10


def test_decoded_steps_are_counted_as_simulated_ones_are():
    model, attn = make(), composed(TopK(k=26))
    ids = prompt(1)["input_ids"]
    cache = DynamicCache(config=model.config)
    with attn.attach(model) as handle:
        forward(model, ids, cache)
        for token in (5, 6, 7):
            forward(model, torch.tensor([[token]]), cache)
        report = handle.report()
    assert (report.positions, report.searched, report.keys_ranked) == (3, 3, 6.0)
    with attn.replace(selector=attn.selector.revised(k=20)).attach(model) as handle:
        forward(model, torch.tensor([[5]]), cache)
        assert (handle.report().positions, handle.report().searched) == (1, 0)
