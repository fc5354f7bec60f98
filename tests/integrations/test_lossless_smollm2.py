"""The real model with checked drafts: SmolLM2-135M-Instruct writes what it writes alone, and most drafts are right."""

import pytest
import torch

from hashattn import HashAttention
from hashattn.lab.workload.assets import SHAKESPEARE, fetch
from tests.integrations.lossless import both, cheap_drafts

__all__ = ["cheap_drafts"]
pytestmark = [
    pytest.mark.usefixtures("cheap_drafts"),
    pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning"),
]
TOKENS, NEW = 1200, 32


@pytest.fixture(scope="module")
def ids(smollm2):
    text = fetch(SHAKESPEARE, quiet=True).read_text(encoding="utf-8")[20_000:30_000]
    return smollm2[1](text, return_tensors="pt").input_ids[:, :TOKENS]


@pytest.mark.parametrize(
    ("preset", "budget", "least", "do_sample"),
    [
        ("dashkv_fast", {"share": 0.15}, 0.7, False),
        ("dashkv_fast", {"share": 0.15}, 0.7, True),
        ("streaming", {"recent": 200}, 0.4, False),
    ],
)
def test_presets_draft_and_the_model_writes(smollm2, ids, preset, budget, least, do_sample):
    attn = HashAttention.from_preset(preset, engine="cpu", **budget)
    options = {"max_new_tokens": NEW, "do_sample": do_sample, "temperature": 0.7, "top_k": 40}

    def run():
        return smollm2[0].generate(ids, attention_mask=torch.ones_like(ids), **options)

    expected, written, report = both(smollm2[0], attn, run)
    assert torch.equal(written, expected)
    assert report.drafts.fidelity > least, report.drafts
    assert report.drafts.tokens_a_pass > 1.5
