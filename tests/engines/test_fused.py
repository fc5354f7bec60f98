"""Fused steps on a cache that changes between them, against the reference; on the CPU they run their specifications."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hashattn import (
    AsymmetricHash,
    ExactAttend,
    FlatHamming,
    HashAttention,
    LocalTopK,
    MixedPrecision,
    Recent,
    SimHash,
    Sink,
    Tiers,
    TopK,
)
from hashattn.core.types import Step
from hashattn.engines.base import Call, Request
from hashattn.engines.fused import FusedStep
from hashattn.ops.decode import library, request
from hashattn.ops.decode.cuda import InCuda, compiler
from hashattn.store import Resident
from tests.engines.families import FAMILIES
from tests.structured import qkv

BATCH, KV_HEADS, DIM = 2, 2, 64
PARTS = {
    "linear": HashAttention(SimHash(64), FlatHamming(), Sink(4) | Recent(8) | TopK(share=0.1)),
    "no centre, two planes": HashAttention(SimHash(100, 2, centring=None), FlatHamming(), TopK(k=20, per="kv_head")),
    "MLPs": HashAttention(AsymmetricHash(64, query_hidden=(24,), key_hidden=(24, 16)), FlatHamming(), TopK(k=20)),
    "encoded in PyTorch": HashAttention(AsymmetricHash(64, heads=2), FlatHamming(), TopK(k=20)),
    "medium keys": HashAttention(SimHash(64), FlatHamming(), Tiers(0.1, 0.3), MixedPrecision(a=1.3)),
    "chunks": HashAttention(SimHash(64), FlatHamming(), LocalTopK(k=32, per_chunk=8)),
    **FAMILIES,
}
pytestmark = pytest.mark.filterwarnings("ignore:this .* is not fitted")


class Both:
    """Two equal caches: one is searched by fused steps, the other by the reference."""

    def __init__(self, attn, keys=300, capacity=None, starts=(0, 70), device="cpu"):
        self.attn, self.fused = attn.replace(engine="reference"), attn.replace(engine="gpu")
        q, k, v = qkv(11, BATCH, group=3, tokens=40, keys=keys + 100, dim=DIM)
        self.q, self.k, self.v, self.at = q.to(device), (k + 1).to(device), v.to(device), keys
        self.caches = [self.attn.new_cache(BATCH, KV_HEADS, DIM, capacity=capacity) for _ in range(2)]
        for cache in self.caches:
            cache.append(self.k[:, :, :keys], self.v[:, :, :keys], start=torch.tensor(starts))

    def append(self, tokens=1):
        here, self.at = slice(self.at, self.at + tokens), self.at + tokens
        for cache in self.caches:
            cache.append(self.k[:, :, here], self.v[:, :, here])

    @torch.no_grad()
    def check_appending(self, tokens=1):
        """The same of a step that appends: in one launch with the codes, where that can be."""
        (here, self.at), (fused, plain) = (slice(self.at, self.at + tokens), self.at + tokens), self.caches
        q, new = self.q[:, :, self.at % 20 : self.at % 20 + tokens], (self.k[:, :, here], self.v[:, :, here])
        plain.append(*new)
        expected, found = self.attn.run(q, plain)[0], self.fused.run(q, fused, append=new)[0]
        assert (found.out - expected.out).abs().max() <= 1e-5 * self.v.abs().max()
        assert fused.kv.coming is None
        codes = ["codes"] if fused.index is not None else []
        for what in ("keys", "values", *codes, *(["norms"] if fused.with_norms else [])):
            assert torch.equal(getattr(fused, what), getattr(plain, what))

    def change(self, name, *given):
        for cache in self.caches:
            getattr(cache, name)(*given)

    @torch.no_grad()
    def check(self, tokens=1, attn=None, causal=True):
        """A step of each keeps the same keys, and all codes, norms and numbers are alike."""
        attn, (fused, plain) = attn or self.attn, self.caches
        q = self.q[:, :, self.at % 20 : self.at % 20 + tokens]
        (exact, expected) = attn.run(q, plain, need_lse=True, scale=0.125, causal=causal)
        out, found = FusedStep(attn.parts, Request.of(q, fused))(q, fused, Call(0.125, causal, Step()))
        a, b = (x.ids.sort(-1).values for x in (found, expected))
        more = a.shape[-1] - b.shape[-1]
        assert more >= 0 and (a[..., :more] == -1).all() and torch.equal(a[..., more:], b)
        assert found.filled in (None, int(found.count.sum()))
        assert (out.out - exact.out).abs().max() <= 1e-5 * self.v.abs().max()
        assert fused.index is None or torch.equal(fused.codes, plain.codes)
        assert not fused.with_norms or torch.equal(fused.norms, plain.norms)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("capacity", [None, 340])
@pytest.mark.parametrize("name", PARTS)
def test_steps_follow_a_cache_that_changes(name, capacity, device):
    both = Both(copy.deepcopy(PARTS[name]).to(device), capacity=capacity, device=device)
    both.check()  # after a prefill
    for _ in range(3):
        both.append()
        both.check()
    both.check()  # nothing new
    both.append()
    both.append()
    both.check()  # two columns that nobody searched
    both.append(3)
    both.check(tokens=3)
    both.check(tokens=3, causal=False)
    both.change("crop", 290)
    both.check()
    both.append()
    both.check()
    both.change("reorder", torch.tensor([1, 0]))
    both.append()
    both.check()
    both.change("set_start", torch.tensor([30, 0]))
    both.check()
    both.append()
    both.check()
    both.change("forget_code")
    both.check()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", PARTS)
def test_steps_append_what_their_queries_belong_to(name, device, monkeypatch):
    monkeypatch.setattr(request, "DEVICES", ("cuda", "cpu"))
    both = Both(copy.deepcopy(PARTS[name]).to(device), starts=(0, 3), device=device)
    for _ in range(3):
        both.check_appending()
    both.append()
    both.check_appending()  # two columns that have no codes
    both.check_appending(3)
    both.check()
    both.change("crop", 290)
    both.check_appending()
    both.change("reorder", torch.tensor([1, 0]))
    both.check_appending()
    both.change("set_start", torch.tensor([30, 0]))
    both.check_appending()
    for _ in range(7):
        both.check_appending(9)  # its memory moves
    both.check()


def test_a_step_that_appends_writes_in_its_own_launch(monkeypatch):
    monkeypatch.setattr(request, "DEVICES", ("cuda", "cpu"))
    written, copied = [], []
    encode, settle = library.Encode.__call__, Resident.settle
    monkeypatch.setattr(library.Encode, "__call__", lambda self, *x: (written.append(x[3]), encode(self, *x))[1])
    monkeypatch.setattr(Resident, "settle", lambda self: (copied.append(self.coming), settle(self))[1])
    both = Both(PARTS["linear"], starts=(0, 3))
    both.check_appending()
    assert written == [] and any(new is not None for new in copied)  # a prefill, which is encoded at once
    for times in range(1, 4):
        copied.clear()
        both.check_appending()
        assert written == [300 + n for n in range(1, times + 1)] and not any(new is not None for new in copied)


@pytest.mark.parametrize("name", ["linear", "encoded in PyTorch"])
def test_a_step_that_is_refused_appends_nothing_and_one_that_fails_loses_nothing(name, monkeypatch):
    monkeypatch.setattr(request, "DEVICES", ("cuda", "cpu"))
    both = Both(PARTS[name], starts=(0, 3))
    attn, cache, new = both.fused, both.caches[0], (both.k[:, :, :1], both.v[:, :, :1])
    both.check_appending()
    before = len(cache)
    with pytest.raises(TypeError, match="k must match the cache"):
        attn.run(both.q[:, :, :1], cache, append=tuple(x.double() for x in new))
    for given in ({"scale": "1"}, {"q": both.q[:, :5, :1]}, {"q": both.q[:1, :, :1]}):
        with pytest.raises((TypeError, ValueError)):
            attn.run(**{"q": both.q[:, :, :1], "cache": cache, "append": new, **given})
        assert len(cache) == before and cache.kv.coming is None
    with pytest.raises(TypeError, match="append is for a cache"):
        attn(both.q[:, :, :1], *new, append=new)
    both.check_appending()
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(FusedStep, "__call__", lambda *given: {}["no"])
        attn.run(both.q[:, :, :1], cache, append=new)
    assert len(cache) == before + 2 and torch.equal(cache.keys[:, :, -1:], new[0])
    both.caches[1].append(*new)
    both.check_appending()


def test_codes_grow_with_the_cache():
    both = Both(PARTS["linear"], starts=(0, 3))
    both.check()
    room = both.caches[0].storage("codes").shape[2]
    both.append(room - 302)
    for _ in range(4):
        both.append()
        both.check()
    assert both.caches[0].storage("codes").shape[2] > room


def test_a_fitted_encoder_and_other_parts_are_taken_up():
    attn = PARTS["linear"].replace(encoder=AsymmetricHash(64, query_hidden=(16,)))
    both = Both(attn)
    both.check()
    both.append()
    both.check()
    q, k, _ = qkv(5, 1, group=3, tokens=200, keys=200, dim=DIM)
    attn.encoder.fit(q, k, steps=2)
    both.check()
    both.append()
    both.check()
    other = both.attn.replace(selector=TopK(k=11))
    both.append()
    both.check(attn=other)
    both.check()


def test_copies_and_loaded_caches_have_steps_of_their_own():
    both = Both(PARTS["linear"])
    both.check()
    both.append()
    both.check()
    twins = copy.deepcopy(both.caches)
    both.append()
    both.check()
    at = both.at
    both.caches, both.at = twins, at - 1
    both.append()
    both.check()
    state = both.caches[1].state_dict()
    both.change("load_state_dict", state)
    both.append()
    both.check()


def test_a_row_that_becomes_too_short_is_left_to_the_reference():
    both = Both(PARTS["linear"], starts=(0, 30))
    both.check()
    both.change("crop", 265)
    both.check()
    both.append()
    both.check()


class Dispatched(TorchDispatchMode):
    """The names of PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels that are launched in CUDA C++; none runs."""
    pytest.importorskip("cuda.bindings")
    launched = []

    class Launcher:
        def __init__(self, kernel, grid, threads, argument, **options):
            self.kernel = kernel

        def __call__(self, stream):
            launched.append(self.kernel)

    monkeypatch.setattr(compiler, "kernel", lambda name, *_: name)
    monkeypatch.setattr(compiler, "Launcher", Launcher)
    monkeypatch.setattr(compiler, "why_not", lambda: None)
    monkeypatch.setattr(request, "DEVICES", ("cpu",))
    monkeypatch.setattr(library, "kernels_for", lambda _: InCuda())
    monkeypatch.setattr(library, "kernels_on", lambda _: InCuda())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=1))
    return launched


@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(64)], ids=["linear", "MLP"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_step_is_an_encoding_and_two_launches_and_allocates_its_results_alone(launched, encoder, mode):
    attn = HashAttention(encoder, FlatHamming(), Sink(4) | TopK(share=0.1), ExactAttend(), engine="gpu")
    cache, (q, k, v) = attn.new_cache(1, 2, 64), qkv(3, 1, tokens=1, keys=300, dim=64)
    cache.append(k, v)
    with mode():
        for _ in range(2):
            cache.append(k[:, :, :1], v[:, :, :1])
            launched.clear()
            with Dispatched() as dispatched:
                attn.run(q, cache)
            assert cache.encoded == len(cache)
        assert launched == ["encode", "scan", "attend"]
        assert dispatched.names == ["empty_like"] * 3  # out, lse and ids
        for _ in range(2):
            launched.clear()
            with Dispatched() as dispatched:
                attn.run(q, cache, append=(k[:, :, :1], v[:, :, :1]))
            assert launched == ["encode", "scan", "attend"] and cache.encoded == len(cache)
            assert "copy_" not in dispatched.names and dispatched.names[-4:] == ["new_empty", *["empty_like"] * 3]
