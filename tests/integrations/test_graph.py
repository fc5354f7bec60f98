"""Calls of few tokens that replay a graph of an attached model: the same tokens as eager steps. On the CPU, where
recorder.py stands for CUDA graphs and the operators of the fused step run their specifications."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hashattn.engines.decoder import Decoder
from hashattn.integrations.attached.graph_capture import Rehearsal
from hashattn.integrations.attached.passes import Pass
from hashattn.integrations.transformers import detach
from hashattn.integrations.transformers.graphs import FIRST
from tests.integrations import tiny
from tests.integrations.models import (
    CACHE,
    DASHKV,
    LENGTH,
    TENTH,
    TIERS,
    cache_of,
    check_codes,
    forward,
    make,
    prompt,
    write,
)
from tests.integrations.recorder import graphs_anywhere

__all__ = ["graphs_anywhere"]
pytestmark = pytest.mark.usefixtures("graphs_anywhere")
FUSED = TENTH.replace(engine="gpu", dense_layers=(0,))
OPTIONS = {"eos_token_id": None, "pad_token_id": 0}


def small(name="llama", **changes):
    return make(name, **{"head_dim": 64, "num_hidden_layers": 2, **changes})


@pytest.fixture(scope="module")
def model():
    return small()


def both(model, run, attn=FUSED, **options):
    """What run() gives with eager steps, and with replayed ones; and the report of these."""
    with attn.attach(model, **options):
        expected = run()
    with attn.attach(model, graph="always", **options) as handle:
        found = run()
        return expected, found, handle.report()


WAYS = {
    "greedy": (2, {}),
    "one row": (1, {}),
    "sampling": (2, {"do_sample": True, "temperature": 0.8}),
    "several sequences": (1, {"do_sample": True, "num_return_sequences": 3}),
    "beams": (2, {"num_beams": 3}),
    "processors": (2, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}),
    "chunked prefill": (2, {"prefill_chunk_size": 32}),
    "static": (2, {"cache_implementation": "static"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_writes_what_eager_steps_write(model, way):
    rows, options = WAYS[way]

    def run():
        torch.manual_seed(5)
        out = write(model, prompt(rows), **OPTIONS, **options, return_dict_in_generate=True)
        cache_of(out).crop(-1)
        check_codes(cache_of(out))
        return out.sequences

    expected, found, report = both(model, run)
    assert torch.equal(found, expected)
    moved = way == "chunked prefill"  # its memory is outgrown on the way
    assert (report.graph.replayed, report.graph.captured) == (11 - moved, 1 + moved) and not report.graph.eager
    assert (report.steps, report.layers[1].sparse, report.layers[1].engine) == (11, 11, "gpu")
    assert f"graphs: {11 - moved} calls were replayed, {1 + moved} captured, of up to 0.0 MB" in str(report)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_other_models_and_tiers(name):
    model, attn = small(name), FUSED.replace(selector=TIERS.selector, attend=TIERS.attend, dense_layers=())
    expected, found, report = both(model, lambda: write(model, prompt(), **OPTIONS), attn)
    assert torch.equal(found, expected) and report.graph.replayed == 11


def test_momentum_crosses_layers_inside_a_replayed_step():
    model = small(num_hidden_layers=5)

    @torch.no_grad()
    def run():
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1)["input_ids"], cache)
        return torch.cat([forward(model, torch.tensor([[token]]), cache) for token in range(5, 15)], 1)

    for dense in ((0,), (0, 2)):  # after a dense layer nothing comes nearer
        attn = DASHKV.replace(engine="gpu", dense_layers=dense)
        expected, found, report = both(model, run, attn)
        assert (found - expected).abs().max() < 1e-5
        assert (report.graph.replayed, report.graph.captured) == (10, 1)
        with attn.replace(engine="reference").attach(model):
            assert (run() - found).abs().max() < 1e-4
        alone = attn.replace(selector=attn.selector.revised(momentum=0.0))
        with alone.attach(model):
            assert (run() - found).abs().max() > 1e-3


def test_momentum_is_not_for_static_caches(model):
    attn = DASHKV.replace(engine="gpu")
    with attn.attach(model, graph="auto") as handle:
        write(model, prompt(), **OPTIONS, cache_implementation="static")
        assert any("steps of a static cache do not know" in reason for reason in handle.report().graph.eager)
        assert handle.report().layers[1].engine == "gpu"


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj", "mixtral", "qwen3_moe"])
def test_models_with_other_positions_and_experts(kind):
    model = tiny.build(kind)
    ways = [(rows, static) for rows in (1, 2) for static in (False, True)]
    expected, found, report = both(
        model, lambda: [tiny.write(model, *way) for way in ways], FUSED.replace(engine="dense")
    )
    assert all(map(torch.equal, found, expected)) and report.graph.replayed == 4 * (tiny.NEW - 1)


def test_counts_are_those_of_eager_steps(model):
    attn = FUSED.replace(dense_layers=())
    reports = []
    for graph in ("never", "always", "auto"):
        with attn.attach(model, graph=graph) as handle:
            write(model, prompt(), **OPTIONS)
            reports.append(handle.report())
            handle.reset_report()
            assert handle.report().steps == 0
    plain, own, later = reports
    assert plain.layers == own.layers == later.layers and plain.bytes_per_step == own.bytes_per_step
    assert plain.graph is None and own.graph.largest > own.graph.nbytes == 0
    assert own.as_dict()["graph"]["replayed"] == 11 and later.graph.replayed == 10


def test_the_first_step_of_a_cache_waits_for_no_capture(model, monkeypatch):
    watched, dispatch = [], Rehearsal.__torch_dispatch__
    monkeypatch.setattr(
        Rehearsal, "__torch_dispatch__", lambda self, *given: (watched.append(1), dispatch(self, *given))[1]
    )
    with FUSED.attach(model):
        expected = write(model, prompt(), **OPTIONS)
    with FUSED.attach(model, graph="auto") as handle:
        short = write(model, prompt(), max_new_tokens=2, **OPTIONS)
        assert torch.equal(short, expected[:, : LENGTH + 2])
        report = handle.report().graph
        assert (report.replayed, report.captured, report.eager) == (0, 0, {FIRST: 1})
        assert watched and FIRST in str(handle.report())
        watched.clear()
        assert torch.equal(write(model, prompt(), **OPTIONS), expected)
        report = handle.report().graph
        assert (report.replayed, report.captured, report.eager) == (10, 1, {FIRST: 2})
        assert not watched  # such calls have been seen to wait for nobody


def test_a_capture_follows_a_step_of_its_kind_by_the_same_memory(model):
    steps = []
    with FUSED.attach(model):
        expected = write(model, prompt(), max_new_tokens=90, **OPTIONS)
    with FUSED.attach(model, graph="auto") as handle:
        take = handle._hooks.graphs.take

        def watch(*given):
            found = take(*given)
            steps.append(type(found).__name__)
            return found

        monkey = pytest.MonkeyPatch()
        monkey.setattr(handle._hooks.graphs, "take", watch)
        assert torch.equal(write(model, prompt(), max_new_tokens=90, **OPTIONS), expected)
        grown = steps.index("NoneType", 1)  # the prefill has none either
        assert steps[:3] == steps[grown : grown + 3] == ["NoneType", "Done", "Replay"]
        assert handle.report().graph.captured == 2 and steps.count("Done") == 2
        monkey.undo()


def test_an_interrupted_first_step_is_as_if_it_had_not_been(model, monkeypatch):
    with FUSED.attach(model):
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1)["input_ids"], cache)
        expected = [forward(model, torch.tensor([[token]]), cache) for token in (5, 6, 7)]
    norm = model.model.norm
    for error in (KeyboardInterrupt, ValueError):
        with FUSED.attach(model, graph="auto") as handle:
            cache = DynamicCache(config=model.config)
            forward(model, prompt(1)["input_ids"], cache)

            def broken(self, x, error=error):
                raise error

            with monkeypatch.context() as patch, pytest.raises(error):
                patch.setattr(type(norm), "forward", broken)
                forward(model, torch.tensor([[50]]), cache)
            assert cache.get_seq_length() == LENGTH and not any(layer.recording for layer in cache.layers)
            found = [forward(model, torch.tensor([[token]]), cache) for token in (5, 6, 7)]
            assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, expected, strict=True))
            assert handle.report().graph.replayed == (2 if error is KeyboardInterrupt else 0)


def test_memory_that_is_outgrown_is_captured_anew(model):
    expected, found, report = both(model, lambda: write(model, prompt(), max_new_tokens=170, **OPTIONS))
    assert torch.equal(found, expected)  # room for some 70 more tokens, twice
    assert report.graph.captured == 3 and report.graph.replayed == 169 - 2 and not report.graph.eager


@pytest.mark.parametrize("searches", [True, False])
def test_steps_without_a_capacity_read_nothing_that_was_not_written(searches):
    attn = FUSED if searches else FUSED.replace(engine="dense")
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 1, 64), torch.randn(1, 2, 91, 64), torch.randn(1, 2, 91, 64)
    cache = attn.new_cache(1, 2, 64)
    cache.append(k[:, :, :90], v[:, :, :90])
    for held in cache.allocated:
        held[:, :, 90:] = torch.finfo(torch.float32).max
    cache.encode()
    with pytest.raises(ValueError, match="cache must have a capacity"):
        Decoder(attn.parts, cache, searches=searches)
    decoder = Decoder(attn.parts, cache, searches=searches, led=True)
    decoder.prepare(6)
    found = decoder.step(q, k[:, :, 90:], v[:, :, 90:], 0.125)
    assert decoder.room >= 91 and len(decoder.finish(91)) == 91 and decoder.fits(cache)
    assert torch.allclose(found, attn.run(q, cache, scale=0.125)[0].out, atol=1e-5)
    cache.append(k, v)
    assert not decoder.fits(cache) and not decoder.holds(cache)  # its memory has moved


def test_second_turns_and_crops_go_on_in_the_same_graph(model):
    def run():
        cache, written = DynamicCache(config=model.config), []
        text = prompt(2, padding=(0, 0))["input_ids"]
        for keep in (0, -3, 0):
            mask = {"attention_mask": torch.ones_like(text)}
            text = write(model, {"input_ids": text, **mask}, cache, **OPTIONS)
            written.append(text)
            if keep:
                cache.crop(keep)
                text = text[:, : cache.get_seq_length() + 1]
            text = torch.cat([text, torch.tensor([[7, 8, 9], [9, 8, 7]])], 1)
        check_codes(cache)
        return torch.cat(written, 1)

    expected, found, report = both(model, run)
    assert torch.equal(found, expected)
    assert report.graph.replayed >= 33 - 2 and report.graph.captured <= 2


@pytest.mark.parametrize("draft", [{"prompt_lookup_num_tokens": 3}, {}])
def test_assisted_decoding_replays_checks_of_several_tokens(model, draft):
    assistant = draft or {"assistant_model": small(num_hidden_layers=1), "num_assistant_tokens": 3}
    text = prompt(1)
    text["input_ids"][0, 40:80] = text["input_ids"][0, :40]  # something to look up
    expected, found, report = both(model, lambda: write(model, text, **OPTIONS, **assistant), FUSED, max_sparse_q=6)
    assert torch.equal(found, expected)
    assert report.graph.replayed > 1 and not report.graph.eager


def test_calls_of_several_tokens_are_counted_as_such(model):
    def run():
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            forward(model, prompt(1)["input_ids"], cache)
            outs = [forward(model, torch.arange(5, 5 + n)[None], cache) for n in (1, 4, 1, 4)]
        assert cache.get_seq_length() == LENGTH + 10
        return torch.cat(outs, 1)

    attn = FUSED.replace(dense_layers=())
    with attn.attach(model, max_sparse_q=4) as handle:
        expected, plain = run(), handle.report()
    with attn.attach(model, max_sparse_q=4, graph="always") as handle:
        found, report = run(), handle.report()
    assert (found - expected).abs().max() < 1e-5
    assert report.layers == plain.layers and (report.graph.replayed, report.graph.captured) == (4, 2)


def test_two_caches_in_turns(model):
    texts = [prompt(1, seed=1), prompt(1, seed=2)]

    @torch.no_grad()
    def run():
        held = [DynamicCache(config=model.config) for _ in texts]
        last = [forward(model, x["input_ids"], cache)[:, -1:].argmax(-1) for x, cache in zip(texts, held, strict=True)]
        outs = []
        for _ in range(6):
            for i, cache in enumerate(held):
                logits = forward(model, last[i], cache)
                outs.append(logits)  # kept: a later replay must leave it alone
                last[i] = logits.argmax(-1)
        return torch.cat(outs, 1)

    expected, found, report = both(model, run)
    assert (found - expected).abs().max() < 1e-5
    assert (report.graph.replayed, report.graph.captured) == (12, 2)


def test_threads_have_graphs_of_their_own_and_share_none(model):
    texts = [prompt(1, seed=seed) for seed in range(3)]
    with FUSED.attach(model):
        expected = [write(model, text, **OPTIONS) for text in texts]
    with FUSED.attach(model, graph="always") as handle:
        found = [None] * 3

        def run(i):
            found[i] = write(model, texts[i], **OPTIONS)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(map(torch.equal, found, expected))
        assert handle.report().graph.captured == 3 and handle.report().graph.replayed == 33
        cache = DynamicCache(config=model.config)
        forward(model, texts[0]["input_ids"], cache)
        for times in (1, 2):  # a thread that takes a cache over captures a graph of its own
            thread = threading.Thread(target=forward, args=(model, torch.tensor([[5]]), cache))
            thread.start()
            thread.join()
            forward(model, torch.tensor([[5]]), cache)
            assert handle.report().graph.captured == 3 + 2 * times
        passes, errors = next(iter(model.model._forward_pre_hooks.values())).__self__.forward.passes, []
        passes.open(one := Pass({}))
        passes.claim(one, cache, None)

        def clash():
            try:
                forward(model, torch.tensor([[5]]), cache)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=clash)
        thread.start()
        thread.join()
        passes.close()
        assert "this cache is in use" in errors[0]
        assert torch.isfinite(forward(model, torch.tensor([[5]]), cache)).all()


def test_row_operations_between_replays(model):
    @torch.no_grad()
    def run():
        cache, outs = DynamicCache(config=model.config), []
        ids, mask = prompt()["input_ids"], prompt()["attention_mask"]
        model(input_ids=ids, attention_mask=mask, **{CACHE: cache})
        changes = [
            lambda: None,
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.crop(-2),
            lambda: cache.batch_select_indices(torch.tensor([0, 3])),
            lambda: None,
        ]
        for change in changes:
            change()
            rows, columns = cache.layers[0].kv.batch, cache.get_seq_length() + 1
            starts = cache.layers[1].kv._starts
            seen = (torch.arange(columns) >= torch.tensor(starts)[:, None]).long()
            positions = seen.sum(1, keepdim=True) - 1
            out = model(
                input_ids=torch.full((rows, 1), 7), attention_mask=seen, position_ids=positions, **{CACHE: cache}
            )
            outs.append(out.logits.flatten())
        check_codes(cache)
        return torch.cat(outs)

    expected, found, report = both(model, run)
    assert (found - expected).abs().max() < 1e-5
    assert report.graph.replayed == 6


def test_an_interrupted_replay_is_as_if_it_had_not_been(model):
    with FUSED.attach(model):
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1)["input_ids"], cache)
        expected = [forward(model, torch.tensor([[token]]), cache) for token in (5, 6, 7)]
    with FUSED.attach(model, graph="always") as handle:
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1)["input_ids"], cache)
        found = [forward(model, torch.tensor([[5]]), cache)]
        held = handle._hooks.graphs._caches[cache]
        (graph,) = held.by_call.values()
        replay = graph.replay

        def broken():
            replay()
            raise KeyboardInterrupt

        object.__setattr__(graph, "replay", broken)
        with pytest.raises(KeyboardInterrupt):
            forward(model, torch.tensor([[50]]), cache)
        object.__setattr__(graph, "replay", replay)
        assert cache.get_seq_length() == LENGTH + 1
        found += [forward(model, torch.tensor([[token]]), cache) for token in (6, 7)]
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, expected, strict=True))
        with pytest.raises(ValueError, match="the cache holds 1 rows, but the input has 2"):
            forward(model, torch.full((2, 3), 5), cache)
        assert torch.isfinite(forward(model, torch.tensor([[8]]), cache)).all()
        assert cache.get_seq_length() == LENGTH + 4 and handle.report().graph.captured == 1


def test_detaching_and_attaching_again_in_the_middle(model):
    original = model.model.forward.__func__

    @torch.no_grad()
    def run(graph):
        cache, outs = DynamicCache(config=model.config), []
        for turn in range(3):
            with FUSED.attach(model, graph=graph) as handle:
                if turn == 0:
                    forward(model, prompt(1)["input_ids"], cache)
                outs += [forward(model, torch.tensor([[token]]), cache) for token in (5, 6)]
            outs.append(forward(model, torch.tensor([[9]]), cache))  # detached: dense
            assert "forward" not in vars(model.model) and model.model.forward.__func__ is original
        assert handle.report().graph is None or handle.report().graph.nbytes == 0
        return torch.cat(outs, 1)

    assert (run("always") - run("never")).abs().max() < 1e-5
    FUSED.attach(model, graph="auto")
    detach(model)
    assert "forward" not in vars(model.model)


def test_an_update_is_captured_anew(model):
    @torch.no_grad()
    def run(graph):
        with FUSED.attach(model, graph=graph) as handle:
            cache = DynamicCache(config=model.config)
            forward(model, prompt(1)["input_ids"], cache)
            outs = [forward(model, torch.tensor([[5]]), cache)]
            handle.update(share=0.5)
            outs.append(forward(model, torch.tensor([[6]]), cache))
            return torch.cat(outs, 1), handle.report()

    (expected, plain), (found, report) = run("never"), run("always")
    assert (found - expected).abs().max() < 1e-5
    assert report.graph.captured == 2 and report.layers[1].keys_read == plain.layers[1].keys_read


def test_copies_are_attached_on_their_own():
    model = small()
    text = prompt(1)
    with FUSED.attach(model, graph="always") as handle:
        expected = write(model, text, **OPTIONS)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                twin.lm_head.weight.neg_()
                twin.model.norm.weight.mul_(2)
            assert not torch.equal(write(twin, text, **OPTIONS), expected)
            assert torch.equal(write(model, text, **OPTIONS), expected)
            detach(twin)
            assert "forward" not in vars(twin.model)
        assert handle.report().graph.captured == 3
        cache = DynamicCache(config=model.config)
        forward(model, text["input_ids"], cache)
        forward(model, torch.tensor([[5]]), cache)
        twin = copy.deepcopy(cache)
        first, second = (forward(model, torch.tensor([[6]]), held) for held in (cache, twin))
        assert (first - second).abs().max() < 1e-5 and twin.get_seq_length() == cache.get_seq_length()


def test_memory_goes_with_the_caches_and_the_handle(model):
    handle = FUSED.attach(model, graph="always")
    graphs = handle._hooks.graphs
    gc.disable()  # by reference counts alone
    try:
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1)["input_ids"], cache)
        forward(model, torch.tensor([[5]]), cache)
        held = graphs._caches[cache]
        seen = [weakref.ref(x) for x in (*held.by_call.values(), cache.layers[1], cache.layers[1].kv, cache)]
        assert handle.report().graph.nbytes > 0
        del cache, held
        assert [x() for x in seen] == [None] * len(seen)
        assert handle.report().graph.nbytes == 0 and handle.report().steps == 1
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1)["input_ids"], cache)
        forward(model, torch.tensor([[5]]), cache)
        graph = weakref.ref(next(iter(graphs._caches[cache].by_call.values())))
        handle.detach()
        assert graph() is None
    finally:
        gc.enable()


def test_a_static_cache_has_a_graph_too(model):
    @torch.no_grad()
    def run():
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
        forward(model, prompt(1)["input_ids"], cache)
        outs = [forward(model, torch.tensor([[token]]), cache) for token in (5, 6, 7)]
        with pytest.raises(ValueError, match="the static cache holds 93 of max_cache_len=93"):
            forward(model, torch.tensor([[8]]), cache)
        assert int(cache.get_seq_length()) == LENGTH + 3
        return torch.cat(outs, 1)

    expected, found, report = both(model, run)
    assert (found - expected).abs().max() < 1e-5
    assert (report.graph.replayed, report.graph.captured) == (3, 1)
