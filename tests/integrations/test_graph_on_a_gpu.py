"""Graphs that an attached model captures by itself, on a GPU. Run with pytest -m gpu."""

import gc
import threading
import time

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

from hashattn.integrations.attached import graph_capture
from hashattn.integrations.transformers.graphs import FIRST
from tests.integrations.models import DASHKV, LENGTH, TENTH, TIERS, forward, make, prompt, write

pytestmark = pytest.mark.gpu
FUSED = TENTH.replace(engine="gpu", dense_layers=(0,))
OPTIONS = {"eos_token_id": None, "pad_token_id": 0}
WAYS = {
    "greedy": (2, {}),
    "sampling": (2, {"do_sample": True, "temperature": 0.8}),
    "several sequences": (1, {"do_sample": True, "num_return_sequences": 3}),
    "beams": (2, {"num_beams": 3}),
    "chunked prefill": (2, {"prefill_chunk_size": 32}),
    "outgrown": (2, {"max_new_tokens": 150}),
    "static": (2, {"cache_implementation": "static", "disable_compile": True}),
}


@pytest.fixture
def model():
    return make("llama", head_dim=64, num_hidden_layers=3).cuda()


def text(rows=2, seed=0):
    return {name: x.cuda() for name, x in prompt(rows, seed=seed).items()}


def both(model, run, attn=FUSED, **options):
    with attn.attach(model, **options):
        expected = run()
    with attn.attach(model, graph="always", **options) as handle:
        found = run()
        return expected, found, handle.report()


@pytest.mark.parametrize(
    "attn",
    [FUSED] + [FUSED.replace(selector=other.selector, attend=other.attend) for other in (TIERS, DASHKV)],
    ids=["exact", "tiers", "dashkv"],
)
@pytest.mark.parametrize("way", WAYS)
def test_generate_writes_what_eager_steps_write(model, way, attn):
    rows, options = WAYS[way]
    if way == "static" and attn.selector.needs_weights:
        pytest.skip("steps of a static cache do not know what the layer before kept")

    def run():
        torch.manual_seed(5)
        return write(model, text(rows), **OPTIONS, **options)

    expected, found, report = both(model, run, attn)
    assert torch.equal(found, expected)
    assert report.graph.replayed >= 10 and not report.graph.eager and report.graph.largest > 0
    assert report.layers[1].engine == "gpu"


def test_checks_of_several_tokens(model):
    inputs = text(1)
    inputs["input_ids"][0, 40:80] = inputs["input_ids"][0, :40]
    options = {**OPTIONS, "prompt_lookup_num_tokens": 3}
    expected, found, report = both(model, lambda: write(model, inputs, **options), max_sparse_q=6)
    assert torch.equal(found, expected) and report.graph.replayed > 1 and not report.graph.eager


@torch.no_grad()
def steps(model, cache, tokens):
    return torch.cat([forward(model, torch.tensor([[token]], device="cuda"), cache) for token in tokens], 1)


def filled(model, seed=0, room=None):
    cache = DynamicCache(config=model.config) if room is None else StaticCache(config=model.config, max_cache_len=room)
    with torch.no_grad():
        forward(model, text(1, seed)["input_ids"], cache)
    return cache


def test_turns_crops_and_reorders(model):
    def run():
        one, other = filled(model, 1), filled(model, 2)
        outs = []
        for token in range(5, 9):
            outs += [steps(model, one, [token]), steps(model, other, [token + 1])]
        one.crop(-2)
        one.batch_repeat_interleave(2)
        one.reorder_cache(torch.tensor([1, 0], device="cuda"))
        one.batch_select_indices(torch.tensor([1], device="cuda"))
        with torch.no_grad():
            forward(model, torch.tensor([[5, 6, 7]], device="cuda"), one)
        return torch.cat([*outs, steps(model, one, [9, 10]), steps(model, other, [11])], 1)

    expected, found, report = both(model, run)
    assert (found - expected).abs().max() < 1e-3 and report.graph.replayed == 11


def test_a_static_cache(model):
    def run():
        return steps(model, filled(model, room=LENGTH + 8), range(5, 13))

    expected, found, report = both(model, run)
    assert (found - expected).abs().max() < 1e-3 and (report.graph.captured, report.graph.replayed) == (1, 8)


def test_threads(model):
    with FUSED.attach(model):
        expected = [write(model, text(1, seed), **OPTIONS) for seed in range(3)]
    with FUSED.attach(model, graph="always"):
        found = [None] * 3

        def run(seed):
            with torch.cuda.stream(torch.cuda.Stream()):
                found[seed] = write(model, text(1, seed), **OPTIONS)
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(map(torch.equal, found, expected))


def test_a_model_that_waits_for_the_device_leaves_random_numbers_alone(model, monkeypatch):
    plain = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: plain(self, x) if float(x.sum()) < 1e9 else x
    )
    with FUSED.attach(model, graph="auto") as handle:
        steps(model, filled(model), [5, 6])  # the first is watched
        assert handle.report().graph.eager == {"a step of it waits for the device (aten::_local_scalar_dense)": 2}
        torch.rand(3, device="cuda")
        write(model, text(), do_sample=True, **OPTIONS)


def test_a_capture_that_fails_leaves_random_numbers_alone(model, monkeypatch):
    plain = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(graph_capture, "WAITING", frozenset())  # as if the rehearsal had not seen it
    with FUSED.attach(model, graph="auto") as handle:
        cache = filled(model)
        with monkeypatch.context() as patch:
            patch.setattr(
                modeling_llama.LlamaMLP, "forward", lambda self, x: plain(self, x) if float(x.sum()) < 1e9 else x
            )
            first = steps(model, cache, [5, 6])
        _, reason = handle.report().graph.eager
        assert reason.startswith("capturing it failed") and torch.isfinite(first).all()
        torch.rand(3, device="cuda")
        write(model, text(), do_sample=True, **OPTIONS)
        assert handle.report().graph.captured == 0
    with FUSED.attach(model, graph="always") as handle:
        write(model, text(), do_sample=True, **OPTIONS)
        assert handle.report().graph.replayed == 11


def test_weights_that_change_between_steps(model):
    outs = []
    for graph in ("never", "always"):
        twin = make("llama", head_dim=64, num_hidden_layers=3).cuda()
        with FUSED.attach(twin, graph=graph):
            cache = filled(twin)
            steps(twin, cache, [5])
            twin.model.norm.weight.data.mul_(2)  # in place
            first = steps(twin, cache, [6])
            twin.model.norm.weight = nn.Parameter(twin.model.norm.weight.detach() * 2)
            outs.append(torch.cat([first, steps(twin, cache, [7])], 1))
    assert (outs[0] - outs[1]).abs().max() < 1e-3


def test_a_model_that_is_moved_to_another_type_is_told(model):
    with FUSED.attach(model, graph="auto"):
        cache = filled(model)
        steps(model, cache, [5])
        model.to(torch.float16)
        with pytest.raises(TypeError, match="start with a new cache after moving a model"):
            steps(model, cache, [6])


def test_memory_goes_with_the_caches(model):
    def held():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()  # what is reserved hangs on how small blocks lie

    handle = FUSED.attach(model, graph="always")
    write(model, text(), **OPTIONS)  # what is loaded once
    before = held()
    caches = [filled(model, seed) for seed in range(8)]
    for cache in caches:
        steps(model, cache, [5, 6])
    assert handle.report().graph.nbytes > 0 and held() > before
    del caches, cache
    assert held() <= before and handle.report().graph.nbytes == 0
    handle.detach()


def test_a_capture_leaves_memory_that_is_kept_for_prompts(model, monkeypatch):
    emptied = []
    with FUSED.attach(model, graph="always"):
        held = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        del held
        before, empty = torch.cuda.memory_reserved(), torch.cuda.empty_cache
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (emptied.append(1), empty())[1])
        steps(model, filled(model), [5, 6])
        assert torch.cuda.memory_reserved() >= before and not emptied
        monkeypatch.setattr(graph_capture, "SPARE", 1 << 50)  # as if there were no room for a graph
        steps(model, filled(model), [5, 6])
        assert emptied and torch.cuda.memory_reserved() < before


def test_the_first_step_of_a_cache_captures_nothing(model):
    with FUSED.attach(model):
        expected = write(model, text(), **OPTIONS)
    with FUSED.attach(model, graph="auto") as handle:
        for replayed in (10, 20):
            assert torch.equal(write(model, text(), **OPTIONS), expected)
            assert handle.report().graph.replayed == replayed
        write(model, text(), max_new_tokens=2, **OPTIONS)
        assert handle.report().graph.captured == 2 and handle.report().graph.eager == {FIRST: 3}


def test_the_first_step_takes_no_two_seconds(model):
    deep = make("llama", head_dim=64, num_hidden_layers=32).cuda()
    with FUSED.attach(deep, graph="always"):
        write(deep, text(1), **OPTIONS)  # kernels are compiled once
        cache = filled(deep)
        torch.cuda.synchronize()
        start = time.perf_counter()
        steps(deep, cache, [5])
        torch.cuda.synchronize()
        assert time.perf_counter() - start < 2


def test_a_replayed_step_never_waits_for_python(model):
    deep = make("llama", head_dim=64, num_hidden_layers=32).cuda()
    times = {}
    for graph in ("never", "always"):
        with FUSED.attach(deep, graph=graph):
            cache = filled(deep)
            steps(deep, cache, [5, 6])
            torch.cuda.synchronize()
            start = time.perf_counter()
            steps(deep, cache, range(5, 25))
            torch.cuda.synchronize()
            times[graph] = time.perf_counter() - start
    assert times["always"] < times["never"] / 4, times
