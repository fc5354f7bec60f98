import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import DenseAttend, FlatHamming, HashAttention, SimHash, TopK
from tests.structured import attention64, heads, odd_lengths, poison, qkv, seeds, tolerance, visible_mask


@settings(deadline=None, max_examples=25)
@given(seeds, heads, odd_lengths, st.sampled_from([1, 3, 100]), st.booleans(), st.booleans(), st.sampled_from([0, 40]))
def test_dense_attention_is_exact_with_and_without_its_extras(seed, shape, keys, tokens, causal, extras, padding):
    q, k, v = qkv(seed, 2, *shape, min(tokens, keys), keys)
    start = torch.tensor([0, min(padding, keys)])
    attn = HashAttention(attend=DenseAttend())
    cache = attn.new_cache(2, shape[0], 16)
    cache.append(k, v, start=start)
    output, selection = attn.run(q, cache, causal=causal, need_lse=extras, need_weights=extras)
    assert selection is None
    keep = visible_mask(q.shape[2], keys, start.tolist(), causal)
    exact, weights = attention64(q, k, v, keep)
    tol = tolerance(q, k, v, keep)
    assert (output.out - exact).abs().max() <= tol
    assert (output.weights is not None) == (output.lse is not None) == extras
    if extras:
        assert (output.weights - weights).abs().max() <= tol
        seen = keep.any(-1).expand(output.lse.shape)
        assert (output.lse[~seen] == -torch.inf).all()
        assert output.lse[seen].isfinite().all()


@pytest.mark.parametrize("extras", [False, True])
def test_dense_attention_reads_no_poisoned_padding(extras):
    q, k, v = qkv(0, batch=2, keys=30)
    start = torch.tensor([0, 10])
    attn = HashAttention(SimHash(64), FlatHamming(), TopK(k=3), engine="dense")
    cache = attn.new_cache(2, 2, 16)
    cache.append(poison(k, start), poison(v, start), start=start)
    output, _ = attn.run(q, cache, need_lse=extras, need_weights=extras)
    keep = visible_mask(1, 30, [0, 10])
    assert (output.out - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)
