import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import Channels, FlatDot, FlatHamming, HashAttention, Identity, Recent, SimHash, TopK
from tests.structured import heads, odd_lengths, qkv, raises_naming, seeds

EPS = torch.finfo(torch.float32).eps


def stored(k):
    store = Channels(4).new_store()
    for part in k.split(9, 2):
        store.add(part)
    return store


@settings(deadline=None, max_examples=25)
@given(seed=seeds, shape=heads, keys=odd_lengths, r=st.sampled_from([1, 5, 16]), per=st.sampled_from(["query", "kv"]))
def test_only_the_largest_channels_of_a_query_count(seed, shape, keys, r, per):
    q, k, _ = qkv(seed, 2, *shape, tokens=2, keys=keys)
    found = Channels(r, per=f"{per}_head").distances(stored(k), q)
    size = q.double().abs()
    if per == "kv":
        size = size.view(2, *shape, 2, 16).sum(2, keepdim=True).expand(-1, -1, shape[1], -1, -1).flatten(1, 2)
    cut = size.sort(-1, descending=True).values[..., r - 1 : r]
    part = q.double() * (size >= cut)
    exact = -(part @ k.double().repeat_interleave(shape[1], 1).transpose(-1, -2))
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 16 * EPS * q.norm(dim=-1).max() * k.norm(dim=-1).max()


def test_all_channels_are_the_exact_product():
    q, k, v = qkv(1, keys=60)
    for per in ("query_head", "kv_head"):
        attn = HashAttention(Identity(), Channels(16, per=per), Recent(4) | TopK(k=9), engine="reference")
        assert torch.equal(attn(q, k, v), attn.replace(index=FlatDot())(q, k, v))


def test_bad_input_is_refused():
    q, k, v = qkv(2)
    raises_naming(ValueError, "channels", "0")(lambda: Channels(0))
    raises_naming(ValueError, "per", "group")(lambda: Channels(4, per="group"))
    attn = HashAttention(Identity(), Channels(17), TopK(k=3), engine="reference")
    raises_naming(ValueError, "head_dim = 16", "17")(lambda: attn(q, k, v))
    raises_naming(ValueError, "Channels", "SimHash", "FlatHamming()")(lambda: attn.replace(encoder=SimHash()))
    raises_naming(ValueError, "Identity", "FlatDot()")(lambda: attn.replace(index=FlatHamming()))
    assert eval(repr(Channels(8))) == Channels(8)
