"""Selectors that look back at attention choose in PyTorch, and one kernel attends, here under Triton's interpreter."""

import pytest
import torch

from hashattn import HashAttention, HeavyHitters, ObservationWindow, Recent, Sink
from hashattn.engines.gpu import Gpu
from hashattn.ops import decode
from hashattn.ops.attend import reference
from tests.ops.decode.cases import poisoned
from tests.structured import generator, qkv

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),  # queries that keep no key
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "tokens", "slots", "dim"), [(2, 1, 70, 64), (6, 3, 5, 96), (1, 2, 130, 64)])
def test_one_kernel_attends_as_the_specification_does(heads, tokens, slots, dim, dtype):
    from hashattn.ops.attend.on_gpu import attend

    kv_heads, g = min(2, heads), generator(1)
    q = torch.randn(2, 6, tokens, dim, generator=g).to(DEVICE, dtype)
    k, v = (torch.randn(2, kv_heads, 200, dim, generator=g).to(DEVICE, dtype) for _ in range(2))
    ids = torch.rand(2, heads, tokens, 200, generator=g).argsort(-1)[..., :slots].to(DEVICE, torch.int32)
    ids[:, :, :, 1::3] = -1
    ids[0, 0, 0] = -1  # a query that keeps nothing
    with poisoned():
        out, lse, weights = attend(q, k, v, ids, 0.2, need_weights=True)
    found = reference.logits(q.double(), k.double(), ids, 0.2)
    exact = reference.weigh(found, v.double(), ids, torch.float64, need_lse=True, need_weights=True)
    rounding = 4 * torch.finfo(dtype).eps
    assert (out - exact[0]).abs().max() <= rounding * v.abs().max() + 1e-5
    assert torch.equal(torch.isfinite(lse), torch.isfinite(exact[1]))
    assert (lse - exact[1])[torch.isfinite(lse)].abs().max() <= 1e-4
    assert (weights - exact[2]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "selector",
    [HeavyHitters(share=0.2), ObservationWindow(k=60, window=8), Sink(2) | Recent(4) | HeavyHitters(k=30)],
    ids=["h2o", "snapkv", "forced"],
)
def test_steps_keep_the_reference_s_keys(selector, monkeypatch):
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", DEVICE))
    attn = HashAttention(selector=selector, engine="gpu")
    q, k, v = (x.to(DEVICE) for x in qkv(4, 2, group=2, tokens=110, keys=110, dim=64))
    both = [(each, each.new_cache(2, 2, 64)) for each in (attn, attn.replace(engine="reference"))]
    for own, cache in both:
        cache.append(k[:, :, :100], v[:, :, :100], start=torch.tensor([0, 30]))
        own.accumulate(q[:, :, :100], cache)
    for n in range(100, 104):
        results = []
        for own, cache in both:
            cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
            results.append(own.run(q[:, :, n : n + 1], cache, need_lse=True))
        (out, kept), (exact, expected) = results
        assert torch.equal(kept.ids.sort(-1).values, expected.ids.sort(-1).values)
        assert (out.out - exact.out).abs().max() <= 1e-5 and (out.lse - exact.lse).abs().max() <= 1e-5
    plan = str(attn.explain(q_heads=4, kv_heads=2, head_dim=64, keys=1000, device=DEVICE))
    assert "attend_ids" in plan


def test_graphs_and_what_ranks_are_not_gathered(monkeypatch):
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))
    attn = HashAttention(selector=HeavyHitters(share=0.2), engine="gpu")
    cache = attn.new_cache(1, 2, 64, capacity=64)
    _, k, v = qkv(4, 1, group=2, tokens=20, keys=40, dim=64)
    cache.append(k, v)
    with pytest.raises(ValueError, match="graphs do not hold"):
        attn.decoder(cache).prepare(4)
    assert Gpu.captures
