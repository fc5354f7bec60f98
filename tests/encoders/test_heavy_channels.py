import pytest
import torch

from hashattn import (
    FlatDot,
    HashAttention,
    HeavyChannels,
    ModelFacts,
    PerLayer,
    TopK,
    from_pretrained,
    save_pretrained,
)
from tests.structured import qkv, raises_naming


def fitted(channels=6, label_bits=4, seed=0):
    q, k, _ = qkv(seed, 2, tokens=9, keys=80)
    return HeavyChannels(channels, label_bits=label_bits).fit(q, k)


def test_the_channels_of_largest_products_are_found_for_each_head():
    q, k, _ = qkv(0, 1, 2, 3, tokens=50, keys=200)
    planted = torch.tensor([[1, 4, 9], [2, 4, 15]])
    for h in range(2):
        q[:, 3 * h : 3 * h + 3, :, planted[h]] *= 3
        k[:, h, :, planted[h]] *= 3
        k[:, h, :, 0] *= 3  # large in keys alone: the products are not
    encoder = HeavyChannels(3, label_bits=None).fit(q, k)
    assert torch.equal(encoder.heavy, planted)
    assert torch.equal(encoder.encode_key(k)[0, 1], k[0, 1][:, planted[1]])
    assert torch.equal(encoder.encode_query(q)[0, 2], q[0, 2][:, planted[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_of_4_bits_have_16_levels_from_the_least_to_the_largest(dtype):
    """Double Sparsity (arXiv 2408.07092) keeps labels in 4 bits; the authors' code rounds queries alike."""
    encoder, plain = fitted(), fitted(label_bits=None)
    q, k, _ = qkv(1, 2, keys=70, tokens=9, dtype=dtype)
    k[0, 0, 3], k[0, 1, 4] = 0.25, k[0, 1, 4].abs() + 5  # all alike; all of one sign and far from zero
    for labels, exact in (
        (encoder.encode_key(k), plain.encode_key(k)),
        (encoder.encode_query(q), plain.encode_query(q)),
    ):
        assert labels.dtype == dtype
        exact = exact.double()
        least, largest = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
        step = (largest - least) / 15
        slack = torch.finfo(dtype).eps * exact.abs().amax(-1, keepdim=True) + 1e-6
        assert ((labels.double() - exact).abs() <= step / 2 + slack).all()
        level = (labels.double() - least) / step.clamp(min=1e-30)
        assert ((level - level.round()).abs() * step <= slack).all()
        assert (level.round() >= 0).all() and (level.round() <= 15).all()
        for end in (least, largest):  # both ends are levels, exactly
            at = (exact == end).to(torch.int8).argmax(-1, keepdim=True)
            assert (labels.double().gather(-1, at) - end).abs().max() <= slack.max()
    assert torch.equal(encoder.encode_key(k)[0, 0, 3], plain.encode_key(k)[0, 0, 3])


def test_a_broken_key_stays_broken():
    k = qkv(2, 2, keys=70)[1]
    k[1, 0, 5] = torch.nan
    labels = fitted().encode_key(k)
    assert labels[1, 0, 5].isnan().all()
    assert labels.isnan().sum() == 6


def test_all_channels_rank_as_exact_products_do():
    q, k, v = qkv(2, 2, keys=60, tokens=2)
    attn = HashAttention(fitted(16, None), FlatDot(), TopK(k=9, per="kv_head"), engine="reference")
    exact = -(q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2))
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v)
    assert cache.view(attn.encoder.encode_query(q), 4, cache.spans(2)).raw.sub(exact).abs().max() < 1e-4


def test_saved_encoders_make_the_same_codes(tmp_path):
    facts = ModelFacts("test", "llama", 2, (0, 1), 4, 2, 16)
    save_pretrained(PerLayer([fitted(seed=0), fitted(seed=1)], facts), tmp_path / "heavy")
    loaded = from_pretrained(tmp_path / "heavy").encoder
    q, k, _ = qkv(3)
    for i in range(2):
        assert torch.equal(loaded.layer(i).encode_key(k), fitted(seed=i).encode_key(k))
        assert torch.equal(loaded.layer(i).encode_query(q), fitted(seed=i).encode_query(q))


def test_bad_input_is_refused():
    q, k, v = qkv(4)
    attn = HashAttention(HeavyChannels(4), FlatDot(), TopK(k=3), engine="reference")
    raises_naming(RuntimeError, "not fitted")(lambda: attn(q, k, v))
    raises_naming(ValueError, "channels", "head_dim = 16", "17")(lambda: HeavyChannels(17).fit(q, k))
    raises_naming(ValueError, "q", "multiple of 2")(lambda: HeavyChannels(4).fit(q[:, :3], k))
    raises_naming(ValueError, "channels", "0")(lambda: HeavyChannels(0))
    raises_naming(ValueError, "label_bits", "8")(lambda: HeavyChannels(4, label_bits=8))
    fit = attn.replace(encoder=fitted())
    raises_naming(ValueError, "2 KV heads", "4")(lambda: fit(*qkv(5, kv_heads=4)))
    plan = fit.explain(q_heads=4, kv_heads=2, head_dim=16, keys=100, dtype=torch.float32)
    assert plan.code_bytes == 2 * 100 * 6 * 4
