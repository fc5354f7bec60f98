"""The real model: sparse attention that reads a fifth of the keys finds a needle, a window does not."""

from __future__ import annotations

from hashattn import HashAttention
from hashattn.lab.evaluation.continuation import judge
from hashattn.lab.evaluation.retrieval import continuations
from hashattn.lab.workload.assets import SHAKESPEARE, fetch
from hashattn.lab.workload.retrieval import needle


def test_a_needle_is_found_by_its_codes_and_not_in_a_window(smollm2):
    model, tokenizer = smollm2
    question = needle(tokenizer, fetch(SHAKESPEARE).read_text(encoding="ascii"), 640, seed=1, depth=0.4)
    asked = continuations(model, question)["dense question"]
    full = judge(model, asked)
    hashed = judge(model, asked, HashAttention.from_preset("simhash_topk", share=0.2, query_bits=4, engine="cpu"))
    window = judge(model, asked, HashAttention.from_preset("streaming", recent=124, engine="cpu"))
    assert full.correct and hashed.correct and not window.correct
    assert full.nll < 0.3 and hashed.nll < 0.3 and window.nll > 1, (full.nll, hashed.nll, window.nll)
    assert 0.2 <= hashed.reads["sparse_keys_read"] < 0.21 and 0.19 < window.reads["keys_read"] < 0.21
