"""Recall, mass and error of one layer, against sums written out query by query."""

from __future__ import annotations

import pytest
import torch

from hashattn import Centring, HashAttention, Recent, SimHash, Sink, TopK
from hashattn.core.types import Step
from hashattn.lab.evaluation import recall
from hashattn.lab.kept import Truth

SCALE, PREFILL = 0.3, 60
SHORT = SimHash(64, centring=Centring(keys=16))
TENTH = HashAttention.from_preset("simhash_topk", engine="reference").replace(
    encoder=SHORT, selector=Sink(2) | Recent(4) | TopK(share=0.2)
)
EXACT = HashAttention.from_preset("oracle_topk", engine="reference", share=0.2, sinks=2, recent=4)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(1, h, n, 16, generator=generator) for h, n in ((6, 9), (2, 80), (2, 80)))


def judge(attn, q, k, v, share=0.2, step=None):
    return recall.judge_layer(attn, Truth.of(q, k, v, SCALE), share, PREFILL, step or Step())[0]


def by_hand(attn, q, k, v):
    """The same, one query of one head after the other, in float64."""
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    output, selection = attn.run(q, cache, scale=SCALE)
    rows, outs = [], []
    for head in range(6):
        for t in range(9):
            end = 80 - 9 + t + 1
            logits = k[0, head // 3, :end].double() @ q[0, head, t].double() * SCALE
            p = logits.softmax(0)
            outs.append(p @ v[0, head // 3, :end].double())
            kept = {i for i in selection.ids[0, head, t].tolist() if i >= 0}
            ranking = p.argsort(descending=True).tolist()
            best = set(ranking[: len(kept)])
            forced = {*range(2), *range(end - 4, end)}
            free = [i for i in ranking if i not in forced][: len(kept - forced)]
            hits = (kept - forced) & set(free)
            rows.append([
                len(kept) / end, len(kept & best) / len(kept), float(p[[*kept]].sum()),
                float(p[[*kept]].sum() / p[[*best]].sum()),
                sum(i < PREFILL for i in hits), sum(i < PREFILL for i in free),
                sum(i >= PREFILL for i in hits), sum(i >= PREFILL for i in free), len(kept), end,
            ])  # fmt: skip
    table, full = torch.tensor(rows, dtype=torch.float64), torch.stack(outs)
    error = (output.out[0].double().reshape(-1, 16) - full).norm() / full.norm()
    means, sums = table.mean(0), table.sum(0)
    return {
        "keys_read": sums[8] / sums[9], "recall": means[1], "mass": means[2], "relative_mass": means[3],
        "output_error": error, "recall_prefill": sums[4] / sums[5], "recall_decoded": sums[6] / sums[7],
    }  # fmt: skip


@pytest.mark.parametrize(
    "attn", [TENTH, EXACT, TENTH.replace(selector=TopK(k=12, per="kv_head"))], ids=["hash", "exact", "shared"]
)
def test_figures_are_those_of_sums_by_hand(attn, qkv):
    found = judge(attn, *qkv)
    if attn.selector.shared:  # a group's choice counts for each of its heads
        assert found["keys_read"] == pytest.approx(12 * 9 / sum(range(72, 81)))
        assert found["recall"] < judge(attn.replace(selector=TopK(k=12)), *qkv)["recall"]
        return
    for name, value in by_hand(attn, *qkv).items():
        assert found[name] == pytest.approx(float(value), abs=1e-5), name


def test_exact_scores_find_everything(qkv):
    found = judge(EXACT.replace(selector=TopK(share=0.2)), *qkv)
    for name in ("recall", "relative_mass", "ranked_recall", "ranked_mass", "recall_prefill", "recall_decoded"):
        assert found[name] == pytest.approx(1.0), name
    assert found["recall_at_100"] == 1.0  # of 80 keys
    assert 0 < found["mass"] < 1 and found["output_error"] > 0.01


def test_everything_kept_is_full_attention(qkv):
    found = judge(TENTH.replace(selector=TopK(share=1.0)), *qkv)
    assert found["output_error"] < 1e-5 and found["mass"] == pytest.approx(1.0) and found["keys_read"] == 1.0


def test_the_ranking_is_the_encoders_alone(qkv):
    forced, bare = judge(TENTH, *qkv), judge(TENTH.replace(selector=TopK(share=0.2)), *qkv)
    assert forced["ranked_recall"] == bare["ranked_recall"] == pytest.approx(bare["recall"])
    assert forced["ranked_mass"] == pytest.approx(bare["relative_mass"])
    assert forced["recall"] != bare["recall"]


def test_what_ranks_nothing_has_no_ranking(qkv):
    found = judge(HashAttention.from_preset("streaming", recent=10, engine="reference"), *qkv)
    assert found["ranked_recall"] is None and found["recall_decoded"] is None  # every key that it keeps is forced
    assert found["keys_read"] == pytest.approx(14 * 9 / sum(range(72, 81)))


def test_means_pass_over_what_is_missing():
    assert recall.mean([{"a": 1.0, "b": None}, {"a": 2.0, "b": 4.0}]) == {"a": 1.5, "b": 4.0}
