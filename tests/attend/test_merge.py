import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import ExactAttend, FlatHamming, HashAttention, Output, Selection, SimHash, TopK, merge
from tests.structured import attention64, generator, odd_lengths, qkv, raises_naming, seeds, tolerance, visible_mask


def split(ids, part):
    """Disjoint selections: the slots where part is True, and the others."""
    return Selection(ids.masked_fill(~part, -1)), Selection(ids.masked_fill(part, -1))


@settings(deadline=None, max_examples=40)
@given(seeds, odd_lengths, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_two_halves_merge_to_the_whole(seed, keys, share, dtype):
    q, k, v = qkv(seed, keys=keys, tokens=min(2, keys), dtype=dtype)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), TopK(share=1.0), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    whole, selection = attn.run(q, cache, need_lse=True)
    part = torch.rand(selection.ids.shape, generator=generator(seed)) < share
    halves = [ExactAttend().attend(q, cache, s, 0.25, need_lse=True) for s in split(selection.ids, part)]
    merged = merge(halves)
    keep = visible_mask(q.shape[2], keys, [0])
    tol = 2 * tolerance(q, k, v, keep)  # each part and the merged output are rounded to the dtype
    assert merged.out.dtype == dtype
    assert (merged.out.double() - attention64(q, k, v, keep)[0]).abs().max() <= tol
    assert torch.allclose(merged.lse, whole.lse, atol=1e-5)
    assert torch.equal(merge(halves[::-1]).out, merged.out)


def test_empty_parts_change_nothing():
    empty = Output(torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), -torch.inf))
    full = Output(torch.randn(1, 2, 1, 4, generator=generator(0)), torch.randn(1, 2, 1, generator=generator(1)))
    for parts in ([full, empty], [empty, full], [empty, full, empty], [full]):
        merged = merge(parts)
        assert torch.equal(merged.out, full.out)
        assert torch.equal(merged.lse, full.lse)
    nothing = merge([empty, empty])
    assert (nothing.out == 0).all()
    assert (nothing.lse == -torch.inf).all()


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_many_parts_merge_by_their_mass_at_any_scale(shift):
    outs = torch.randn(5, 1, 1, 1, 4, generator=generator(0))
    lses = torch.randn(5, 1, 1, 1, generator=generator(1)) + shift
    merged = merge([Output(o, x) for o, x in zip(outs, lses, strict=True)])
    expected = (torch.softmax(lses.double(), 0).unsqueeze(-1) * outs.double()).sum(0)
    # an lse near 1e4 is known to one float32 rounding of 1e4
    assert (merged.out - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * (
        1 + abs(shift)
    ) * outs.abs().max()


def test_parts_without_lse_and_no_parts_are_refused():
    raises_naming(ValueError, "parts")(lambda: merge([]))
    raises_naming(ValueError, "lse", "need_lse")(lambda: merge([Output(torch.zeros(1, 1, 1, 4))]))
