"""The simulated mode: one long call does what decoding token by token does."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hashattn import Consensus, HashAttention, Momentum, Recent, Sink, TopK
from hashattn.integrations.attached import simulate as module
from tests.integrations import models
from tests.integrations.models import CACHE, EVERYTHING, ON_CPU, SHORT, TENTH, TIERS, make

CALIBRATED = TENTH.replace(selector=Sink(2) | Recent(4) | Momentum(Consensus(TopK(share=0.2)), ratio=0.5))
AUTO = TENTH.replace(engine="auto")
KEPT = {"tenth": TENTH, "cpu": ON_CPU, "tiers": TIERS, "calibrated": CALIBRATED, "auto": AUTO}


def prompt(batch=2):
    return {name: x[:, :50] for name, x in models.prompt(batch).items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 7)
    monkeypatch.setattr(module, "MOST", 7)  # 50 columns make 8 blocks, the last of them shorter


def run(model, ids, mask, cache=None, **options):
    given = {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **given, **options).logits


def one_by_one(model, attn, inputs, first=0):
    """Logits of decoding: every token is a call of its own, after a call with those that begin a padded row."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, logits = DynamicCache(config=model.config), []
    if attn.engine == "auto":
        attn = attn.replace(engine="cpu")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with attn.attach(model) as handle:
        for a, b in [(0, first)] * (first > 0) + [(i, i + 1) for i in range(first, ids.shape[1])]:
            logits.append(run(model, ids[:, a:b], mask[:, :b], cache, position_ids=positions[:, a:b]))
        report = handle.report()
    return torch.cat(logits, 1), report


def together(model, attn, inputs, cache=None, **options):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with attn.attach(model, simulate=True) as handle:
        return run(model, ids, mask, cache, position_ids=positions, **options), handle.report()


@pytest.mark.parametrize(
    ("name", "kept"), [("gemma3", "tenth"), *(("llama", kept) for kept in ("cpu", "tiers", "calibrated", "auto"))]
)
def test_a_long_call_is_decoding_token_by_token(name, kept):
    model = make(name, num_hidden_layers=4 if name == "gemma3" else 2).double()  # attention itself is in float32
    for inputs, first in ((prompt(1), 0), (prompt(), 10)):  # rows are dense until they have 20 keys
        expected, decoded = one_by_one(model, KEPT[kept], inputs, first)
        seen = inputs["attention_mask"].bool()
        for cache in (None, DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=60)):
            got, report = together(model, KEPT[kept], inputs, cache)
            assert (got - expected)[seen].abs().max() < 2e-6
            assert report.simulated == report.steps == 50
            for simulated, stepped in zip(report.layers, decoded.layers, strict=True):
                assert (simulated.keys_read is None) == (stepped.keys_read is None)  # a sliding window
                if simulated.keys_read is not None:
                    assert simulated.engine == "simulated" and simulated.sparse == 1
                    if not first:  # the very number of keys: so the same were chosen
                        assert simulated.keys_read == stepped.keys_read


def test_it_is_not_the_dense_model_that_answers():
    model, inputs = make(), prompt()
    seen = inputs["attention_mask"].bool()
    sparse, _ = together(model, TENTH, inputs)
    everything, _ = together(model, EVERYTHING, inputs)
    dense = run(model, inputs["input_ids"], inputs["attention_mask"])
    assert (everything - dense)[seen].abs().max() < 1e-5
    assert (sparse - dense)[seen].abs().max() > 1e-3


def test_after_a_dense_prefill_only_the_new_tokens_are_sparse():
    model, inputs = make().double(), prompt(1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        run(model, ids[:, :30], mask[:, :30], cache)
    with ON_CPU.attach(model, max_sparse_q=20):
        expected = run(model, ids[:, 30:], mask, caches[0])
    with ON_CPU.attach(model, simulate=True) as handle:
        got = run(model, ids[:, 30:], mask, caches[1])
        more = run(model, ids[:, :1], torch.ones(1, 51, dtype=torch.int64), caches[1])  # and decoding goes on
        report = handle.report()
    assert (got - expected).abs().max() < 2e-6
    assert more.isfinite().all()
    assert report.steps == 21 and report.simulated == 20
    assert "21 steps, 20 of them simulated: " in str(report)


def test_block_sizes_change_nothing(monkeypatch):
    model, inputs = make(num_hidden_layers=2).double(), prompt()
    seen, found = inputs["attention_mask"].bool(), []
    for size in (3, 16, 200):
        monkeypatch.setattr(module, "FEWEST", size)
        monkeypatch.setattr(module, "MOST", size)
        found.append(together(model, CALIBRATED, inputs)[0][seen])
    assert (found[0] - found[1]).abs().max() < 2e-6
    assert (found[0] - found[2]).abs().max() < 2e-6


def test_dense_layers_and_dense_engines_stay_dense_and_are_counted():
    model, inputs = make(), prompt(1)
    with TENTH.replace(dense_layers=(0,)).attach(
        model, simulate=True, layers={1: TENTH.replace(engine="dense"), 2: HashAttention.from_preset("full")}
    ) as handle:
        run(model, inputs["input_ids"], inputs["attention_mask"])
        rows = handle.report().layers
    assert [row.keys_read == 1.0 for row in rows] == [True, True, True, False]
    assert [list(row.dense) for row in rows] == [
        ["dense_layers"], ["engine is dense"], ["the composition attends densely"], []
    ]  # fmt: skip


def test_short_texts_are_dense():
    model = make()
    ids = prompt(1)["input_ids"][:, : SHORT.centring.warmup - 1]
    with TENTH.attach(model, simulate=True) as handle:
        got = run(model, ids, torch.ones_like(ids))
        assert all("rows too short to be indexed" in row.dense for row in handle.report().layers)
    assert (got - run(model, ids, torch.ones_like(ids))).abs().max() < 1e-5


def test_a_mask_with_holes_is_refused():
    model, inputs = make(), prompt(1)
    inputs["attention_mask"][:, 40] = 0
    with TENTH.attach(model, simulate=True), pytest.raises(ValueError, match="hides keys in the middle of a row"):
        run(model, inputs["input_ids"], inputs["attention_mask"])


def test_blocks_shrink_with_the_keys(monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 16)
    monkeypatch.setattr(module, "MOST", 256)
    assert [module.block_size(1, n) for n in (90, 8192, 1 << 20)] == [256, 64, 16]


def test_the_report_says_what_searched_for_a_single_token():
    model, ids = make(), prompt(1)["input_ids"]
    cache = DynamicCache(config=model.config)
    with AUTO.attach(model, simulate=True) as handle:
        run(model, ids, torch.ones_like(ids), cache)
        run(model, ids[:, :1], torch.ones(1, ids.shape[1] + 1, dtype=torch.long), cache)
        row = handle.report().layers[0]
    assert row.sparse == 2 and (row.engine, row.why) == ("cpu", 'engine="cpu"')
