import pytest
import torch
from hypothesis import given, settings

from hashattn.ops.nearest import nearest_of_pool
from tests.structured import generator, hamming_numpy, heads, odd_lengths, seeds


@pytest.mark.parametrize("planes", [(), (4,)])
@pytest.mark.parametrize("per_query_head", [False, True])
@settings(deadline=None, max_examples=12)
@given(seed=seeds, shape=heads, keys=odd_lengths)
def test_the_keys_of_least_summed_distance_that_any_head_found_are_kept(planes, per_query_head, seed, shape, keys):
    (kv_heads, group), g = shape, generator(seed)
    q_heads = kv_heads * group
    query = torch.randint(-(2**63), 2**63 - 1, (2, q_heads, 3, *planes, 2), generator=g)
    codes = torch.randint(-(2**63), 2**63 - 1, (2, q_heads if per_query_head else kv_heads, keys, 2), generator=g)
    codes[:, :, keys // 2 :] = codes[:, :, : keys - keys // 2].clone()  # ties
    found = torch.rand(2, q_heads, 3, keys, generator=g).argsort(-1)[..., :7]
    found = found.masked_fill(torch.rand(found.shape, generator=g) < 0.3, -1)
    near = nearest_of_pool(found.to(torch.int32), query, codes, kv_heads, 9)
    exact = hamming_numpy(query, codes).reshape(2, kv_heads, group, 3, keys).sum(2)
    for b in range(2):
        for h in range(kv_heads):
            for t in range(3):
                pool = set(found[b, h * group : (h + 1) * group, t].flatten().tolist()) - {-1}
                wanted = sorted(pool, key=lambda c: (exact[b, h, t, c], -c))[:9]
                row = near[b, h, t].tolist()
                assert row == wanted + [-1] * (len(row) - len(wanted))
