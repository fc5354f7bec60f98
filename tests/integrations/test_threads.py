"""Threads that generate on one attached model at once, each with a cache of its own: each gets what it gets alone."""

from __future__ import annotations

import copy
import sys
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hashattn import (
    Consensus,
    ExactAttend,
    HashAttention,
    HeavyHitters,
    Momentum,
    ObservationWindow,
    Recent,
    Reuse,
    Sink,
    TopK,
)
from hashattn.ops.decode import Scratch
from tests.integrations.models import ON_CPU, TENTH, forward, make, prompt, write

FORCED = Sink(2) | Recent(4)
COMPOSITIONS = {
    "topk": TENTH,
    "reuse": TENTH.replace(selector=FORCED | Reuse(TopK(share=0.1), every=2)),
    "momentum": ON_CPU.replace(selector=FORCED | Momentum(Consensus(TopK(share=0.1)), ratio=0.5)),
    "heavy hitters": HashAttention(selector=HeavyHitters(k=20), attend=ExactAttend(), engine="reference"),
    "window": HashAttention(selector=ObservationWindow(k=20, window=8), attend=ExactAttend(), engine="cpu"),
}
ROWS = (1, 2, 1)  # of the threads' prompts, so that what one of them tells does not even fit the others


@pytest.fixture(autouse=True)
def switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def llama():
    return make(num_hidden_layers=3)


def at_once(*works):
    """What the works return, each done by a thread of its own; they begin together."""
    found, begin = [None] * len(works), threading.Barrier(len(works))

    def run(i):
        begin.wait()
        try:
            found[i] = works[i]()
        except Exception as error:  # for the main thread to look at
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def own(model, i, **options):
    return lambda: write(
        model, prompt(ROWS[i], (0, 9), seed=i), max_new_tokens=5, eos_token_id=None, pad_token_id=0, **options
    )


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_each_thread_writes_what_it_writes_alone(llama, name):
    with COMPOSITIONS[name].attach(llama) as handle:
        alone = [own(llama, i)() for i in range(len(ROWS))]
        steps = [(row.sparse, row.dense) for row in handle.report().layers]
        read = handle.report().keys_read
        handle.reset_report()
        found = at_once(*(own(llama, i) for i in range(len(ROWS))))
        report = handle.report()
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)
    assert [(row.sparse, row.dense) for row in report.layers] == steps
    assert report.keys_read == read


def test_so_does_each_in_simulated_calls_without_a_cache(llama):
    ids = [prompt(rows, (0, 0), seed=i)["input_ids"][:, :50] for i, rows in enumerate(ROWS)]

    def likelihoods(i):
        with torch.no_grad():
            return llama(input_ids=ids[i], use_cache=False).logits

    with COMPOSITIONS["momentum"].attach(llama, simulate=True) as handle:
        alone = [likelihoods(i) for i in range(len(ROWS))]
        handle.reset_report()
        found = at_once(*(lambda i=i: likelihoods(i) for i in range(len(ROWS))))
        assert handle.report().steps == 50 * len(ROWS)
    for one, other in zip(found, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_so_does_each_with_a_static_cache(llama):
    with COMPOSITIONS["reuse"].attach(llama):
        options = {"cache_implementation": "static", "disable_compile": True}
        alone = [own(llama, i, **options)() for i in (0, 1)]
        for one, other in zip(at_once(*(own(llama, i, **options) for i in (0, 1))), alone, strict=True):
            assert torch.equal(one, other)


def test_a_change_of_the_composition_is_seen_by_whole_passes_only(llama):
    few, many = (FORCED | Reuse(TopK(share=share), every=4) for share in (0.05, 0.9))
    token, expected = torch.tensor([[5]]), []
    with TENTH.replace(selector=few).attach(llama) as handle:
        cache = DynamicCache(config=llama.config)
        forward(llama, prompt(1)["input_ids"], cache)
        for selector in (few, many):
            handle.update(selector=selector)
            expected.append(forward(llama, token, cache))
            cache.crop(-1)
        assert not torch.allclose(*expected, atol=1e-2)
        stop = threading.Event()

        def change():
            while not stop.is_set():
                for selector in (few, many):
                    handle.update(selector=selector)

        def generate():
            try:
                seen = []
                for _ in range(20):
                    found = forward(llama, token, cache)
                    seen.append([torch.allclose(found, x, atol=1e-5) for x in expected])
                    cache.crop(-1)
                return seen
            finally:
                stop.set()

        seen = at_once(change, generate)[1]
    assert all(sum(row) == 1 for row in seen)


def test_two_threads_with_one_cache_are_refused(llama):
    inside, done = threading.Event(), threading.Event()

    def pause(module, args):
        inside.set()
        assert done.wait(60)

    with TENTH.attach(llama):
        cache = DynamicCache(config=llama.config)
        forward(llama, prompt(1)["input_ids"], cache)
        hook = llama.model.layers[2].register_forward_pre_hook(pause)
        token = torch.tensor([[5]])
        thread = threading.Thread(target=forward, args=(llama, token, cache), name="the first")
        thread.start()
        assert inside.wait(60)
        hook.remove()
        with pytest.raises(RuntimeError, match="in use by a call of the model in thread 'the first'"):
            forward(llama, token, cache)
        other = DynamicCache(config=llama.config)
        forward(llama, prompt(1)["input_ids"], other)  # an own one is served meanwhile
        done.set()
        thread.join()
        assert [layer.get_seq_length() for layer in cache.layers] == [91] * 3
        forward(llama, token, cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [92] * 3


def test_an_error_in_the_middle_of_a_pass_leaves_nothing_behind(llama):
    with COMPOSITIONS["reuse"].attach(llama) as handle:
        cache = DynamicCache(config=llama.config)
        forward(llama, prompt(1)["input_ids"], cache)
        token, passes = torch.tensor([[5]]), handle._hooks.forward.passes
        expected = forward(llama, token, cache)
        cache.crop(-1)

        def fail(module, args):
            held.append(weakref.ref(passes.current()))
            raise RuntimeError("broken off")

        held = []
        hook = llama.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken off"):
            forward(llama, token, cache)
        hook.remove()
        assert passes.current() is None and held[0]() is None
        assert {layer.get_seq_length() for layer in cache.layers} == {cache.get_seq_length()}
        [other] = at_once(lambda: forward(llama, token, cache))  # nor does the cache stay with this thread
        assert torch.allclose(other, expected, atol=1e-5)


def test_a_call_inside_of_a_call_has_a_pass_of_its_own(llama):
    token = torch.tensor([[5]])
    with COMPOSITIONS["reuse"].attach(llama):
        caches = [DynamicCache(config=llama.config) for _ in range(2)]
        for i, cache in enumerate(caches):
            forward(llama, prompt(1, seed=i)["input_ids"], cache)
        expected = [forward(llama, token, cache) for cache in caches]
        for cache in caches:
            cache.crop(-1)
        found = []

        def call(cache):
            def hook(module, args):
                handle.remove()
                found.append(forward(llama, token, cache))

            handle = llama.model.layers[1].register_forward_pre_hook(hook)

        call(caches[1])
        assert torch.equal(forward(llama, token, caches[0]), expected[0])
        assert torch.equal(found[0], expected[1])
        call(caches[0])  # which is in the middle of a pass
        with pytest.raises(RuntimeError, match=r"layer 1 was called in a pass whose cache another call .* has used"):
            forward(llama, token, caches[0])


def test_gradient_checkpointing_is_served_or_refused_before_anything_is_done():
    model, ids = make(num_hidden_layers=2).train(), prompt(1)["input_ids"][:, :40]

    def gradients(selector):
        model.zero_grad()
        with TENTH.replace(selector=selector).attach(model, simulate=True) as handle:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            assert handle._hooks.forward.passes.current() is None
            return model.model.layers[0].self_attn.q_proj.weight.grad.clone(), handle.report().layers[0].sparse

    expected = gradients(FORCED | TopK(share=0.3))
    enable = "activation_checkpointing_enable"  # since transformers 5.24
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    found = gradients(FORCED | TopK(share=0.3))
    assert torch.allclose(found[0], expected[0], atol=1e-6) and found[1] == expected[1] == 1
    with pytest.raises(RuntimeError, match="switch gradient checkpointing off"):
        gradients(FORCED | Reuse(TopK(share=0.3), every=2))


def test_scratch_memory_belongs_to_a_cache(llama):
    with TENTH.attach(llama):
        caches = [DynamicCache(config=llama.config), StaticCache(config=llama.config, max_cache_len=120)]
        for cache in caches:
            forward(llama, prompt(1)["input_ids"], cache)
        caches.append(copy.deepcopy(caches[0]))
        scratches = [{layer.scratch for layer in cache.layers} for cache in caches]
        assert all(len(scratch) == 1 for scratch in scratches)
        assert len(set.union(*scratches)) == 3
        for cache in caches:
            for layer in cache.layers:
                assert isinstance(layer.scratch, Scratch) and layer.kv.on_device.scratch is layer.scratch


def test_plain_calls_of_several_threads_get_what_each_gets_alone():
    generator = torch.Generator().manual_seed(0)
    attn = HashAttention.from_preset("simhash_topk").replace(engine="cpu")
    calls = []
    for keys in (900, 400, 1300):
        q, k, v = (torch.randn(1, h, n, 16, generator=generator) for h, n in ((4, 1), (2, keys), (2, keys)))
        cache = attn.new_cache(1, 2, 16)
        cache.append(k, v)
        calls.append((q, cache))
    alone = [attn(*call) for call in calls]

    def again(call):
        return lambda: [attn(*call) for _ in range(30)]

    for found, expected in zip(at_once(*map(again, calls)), alone, strict=True):
        assert all(torch.equal(x, expected) for x in found)


def test_threads_that_share_a_plain_cache_come_one_after_the_other():
    generator = torch.Generator().manual_seed(0)
    attn = HashAttention.from_preset("simhash_topk").replace(engine="cpu")
    k, q = (torch.randn(1, h, n, 16, generator=generator) for h, n in ((2, 700), (4, 1)))
    expected, cache = attn(q, k, k), attn.new_cache(1, 2, 16)
    cache.append(k, k)  # not encoded yet: each of them would

    found = at_once(*(lambda: [attn(q, cache) for _ in range(20)] for _ in range(3)))
    assert all(torch.equal(x, expected) for outs in found for x in outs)
    assert torch.equal(copy.deepcopy(cache).codes, attn.encoder.encode_key(k, cache.centre))
