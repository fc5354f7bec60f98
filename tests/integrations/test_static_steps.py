"""One-token calls of an attached model with a static cache, compiled as one graph: on the CPU, where the operators of
the fused step run their specifications."""

import copy
import os
import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import CompileConfig, StaticCache

from hashattn.integrations.transformers import HashedLayer, static_layer
from hashattn.ops import decode
from hashattn.ops.decode.specification import Specification
from tests.integrations.models import CACHE, LENGTH, TENTH, TIERS, cache_of, check_codes, hashed, make, prompt, write

FUSED = TENTH.replace(engine="gpu")
MEDIUM = {"selector": TIERS.selector, "attend": TIERS.attend}
ROOM = LENGTH + 20


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name="llama", **changes):
    return make(name, **{"head_dim": 64, "num_hidden_layers": 2, **changes})


def prefilled(model, padding=(0, 9), room=ROOM):
    """A cache that holds the prompt, and the mask of all columns."""
    inputs, cache = prompt(padding=padding), StaticCache(config=model.config, max_cache_len=room)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, room - LENGTH), value=1)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **{CACHE: cache})
    return cache, mask


def step(forward, cache, mask, token):
    with torch.no_grad():
        ids = torch.tensor([[token], [token + 1]])
        return forward(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits.clone()


def compiled(model, backend="eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model.forward, fullgraph=True, backend=counter), counter


def eager_logits(attn, model, tokens, **options):
    with attn.attach(model, **options) as handle:
        cache, mask = prefilled(model)
        found = [step(model, cache, mask[:, : LENGTH + i + 1], token) for i, token in enumerate(tokens)]
        return found, handle.report(), cache


@pytest.mark.parametrize(
    ("name", "backend", "changes"),
    [
        ("llama", "eager", {}),
        ("qwen3", "aot_eager", {}),
        ("gemma3", "eager", {}),
        ("llama", "eager", {"dense_layers": (0,)}),
        ("llama", "aot_eager", MEDIUM),
    ],
)
def test_one_graph_decodes_what_eager_steps_decode(name, backend, changes):
    model = small(name)
    fused, tokens = FUSED.replace(**changes), range(5, 11)
    expected, report, plain = eager_logits(TENTH.replace(**changes), model, tokens)
    with fused.attach(model) as handle:
        cache, mask = prefilled(model)
        forward, counter = compiled(model, backend)
        graphs = 3 if name == "gemma3" else 1  # transformers counts the columns of sliding windows on the host
        for i, token in enumerate(tokens):
            with torch._dynamo.config.patch(error_on_recompile=i >= graphs):
                logits = step(forward, cache, mask, token)
            assert (logits - expected[i]).abs().max() < 1e-4, i
        assert counter.frame_count <= graphs
        assert int(cache.get_seq_length()) == LENGTH + len(tokens)
        found = handle.report()
        for own, other in zip(found.layers, report.layers, strict=True):
            assert (own.sparse, sum(own.dense.values())) == (other.sparse, sum(other.dense.values()))
            assert own.keys_read == other.keys_read and own.bytes_per_step == other.bytes_per_step
            assert own.engine == ("gpu" if own.sparse else other.engine)
        assert (found.steps, found.keys_read) == (report.steps, report.keys_read)
        assert str(handle.report()) == str(found)  # counted once
        for layer in cache.layers:
            if isinstance(layer, HashedLayer):
                layer.crop(0)  # any host call: lengths are adopted
    check_codes(cache)
    for own, other in zip(hashed(cache), hashed(plain), strict=True):
        assert (own.keys - other.keys).abs().max() < 1e-4 and own._starts == other._starts == [0, 9]


class NeverWaiting(TorchDispatchMode):
    """Fails at what would make the host wait for a GPU, or copy to it, which a captured graph cannot do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket not in WAITING, func
        return func(*args, **(kwargs or {}))


WAITING = {
    getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "equal", "nonzero", "lift_fresh", "is_nonzero")
}


def unwatched(make):
    """What stands for kernels on the CPU, which no dispatch mode sees on a GPU."""

    def made(self, like):
        run = make(self, like)

        def step(*given):
            with _disable_current_modes():
                return run(*given)

        return step

    return made


@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("qwen3", {}), ("llama", MEDIUM)])
def test_a_captured_step_asks_the_device_nothing_and_tells_the_host_nothing(monkeypatch, name, changes):
    model, tokens = small(name), range(5, 9)
    expected, _, _ = eager_logits(TENTH.replace(dense_layers=(0,), **changes), model, tokens)
    for what in ("decode", "encode"):
        monkeypatch.setattr(Specification, what, unwatched(getattr(Specification, what)))
    with FUSED.replace(dense_layers=(0,), **changes).attach(model):
        cache, mask = prefilled(model)
        before = [len(layer.kv) for layer in cache.layers]
        with monkeypatch.context() as patch:
            patch.setattr(static_layer, "hidden_from_host", lambda: True)  # as within torch.cuda.graph
            for token, logits in zip(tokens, expected, strict=True):
                ids = torch.tensor([[token], [token + 1]])
                with torch.no_grad(), NeverWaiting():
                    found = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits
                assert (found - logits).abs().max() < 1e-4
        assert [len(layer.kv) for layer in cache.layers] == before
        cache.crop(0)
        assert [len(layer.kv) for layer in cache.layers] == [n + len(tokens) for n in before]


@pytest.mark.parametrize("changes", [{}, MEDIUM], ids=["exact", "tiers"])
def test_host_calls_between_compiled_steps(changes):
    model = small()
    with FUSED.replace(**changes).attach(model):
        cache, mask = prefilled(model)
        forward, counter = compiled(model)
        first = step(forward, cache, mask, 5)
        twin = copy.deepcopy(cache)
        second = step(forward, cache, mask, 7)
        assert (step(model, twin, mask[:, : LENGTH + 2], 7) - second).abs().max() < 1e-4  # eager, on a copy
        cache.crop(-1)
        assert torch.equal(step(forward, cache, mask, 7), second)
        cache.crop(-2)
        assert (step(model, cache, mask[:, : LENGTH + 1], 5) - first).abs().max() < 1e-4
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = step(forward, cache, mask.flip(0), 6)
        assert int(cache.get_seq_length()) == LENGTH + 2 and not torch.equal(swapped, second)
        cache.reset()
        inputs = prompt()
        with torch.no_grad():
            model(**inputs, **{CACHE: cache})
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(step(forward, cache, mask, 5), first)
        assert counter.frame_count == 1
    check_codes(cache)


def test_a_cache_that_overflows_gives_nan_and_the_next_eager_call_says_so():
    model = small()
    with FUSED.attach(model) as handle:
        cache, mask = prefilled(model, room=LENGTH + 2)
        forward, _ = compiled(model)
        outs = [step(forward, cache, mask, 5) for _ in range(4)]
        assert [bool(x.isnan().all()) for x in outs] == [False, False, True, True]
        assert handle.report().steps == 2
        with pytest.raises(ValueError, match=f"capacity is {LENGTH + 2} columns, but {LENGTH + 4} were appended"):
            step(model, cache, mask, 5)
        with pytest.raises(ValueError, match="the static cache holds"):
            step(model, cache, mask, 5)
        cache.crop(-2)
        assert torch.isfinite(step(model, cache, mask[:, : LENGTH + 1], 5)).all()


def test_changes_and_detaching_are_followed():
    model = small()
    handle = FUSED.attach(model)
    cache, mask = prefilled(model)
    forward, _ = compiled(model)
    step(forward, cache, mask, 5)
    twin, length = copy.deepcopy(cache), cache.layers[0].decoder.length
    handle.update(share=0.5)
    step(forward, cache, mask, 6)
    assert cache.layers[0].decoder.length is length  # which a graph may point to
    kept = [row.keys_read for row in handle.report().layers]
    assert all(0.3 < share < 0.4 for share in kept)  # a tenth (and what is forced), then half
    handle.detach()
    step(model, twin, mask[:, : LENGTH + 2], 7)
    assert int(twin.get_seq_length()) == LENGTH + 2 and not any(layer.ready for layer in twin.layers)
    assert int(cache.get_seq_length()) == LENGTH + 2
    step(model, cache, mask[:, : LENGTH + 3], 7)
    assert int(cache.get_seq_length()) == LENGTH + 3


def test_generate_compiles_its_steps():
    model, inputs = small(), prompt()
    options = {
        "cache_implementation": "static", "return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with TENTH.attach(model):
        expected = write(model, inputs, **options).sequences
    config = CompileConfig(fullgraph=True, backend=CompileCounterWithBackend("eager"), mode=None)
    config._compile_all_devices = True
    with FUSED.attach(model) as handle:
        for times in (1, 2):
            out = write(model, inputs, **options, compile_config=config)
            assert torch.equal(out.sequences, expected)
            assert [row.sparse for row in handle.report().layers] == [11 * times] * 2
        cache_of(out).crop(0)
        check_codes(cache_of(out))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("changes", [{}, MEDIUM], ids=["exact", "tiers"])
def test_inductor_copies_no_cache(changes):
    model = small(num_hidden_layers=2)
    expected, _, _ = eager_logits(TENTH.replace(dense_layers=(1,), **changes), model, (5, 6))
    with FUSED.replace(dense_layers=(1,), **changes).attach(model):
        cache, mask = prefilled(model)
        forward = torch.compile(model.forward, fullgraph=True)
        logits, code = run_and_get_code(step, forward, cache, mask, 5)
        assert (logits - expected[0]).abs().max() < 1e-4
        assert (step(forward, cache, mask, 6) - expected[1]).abs().max() < 1e-4
    for what in ("keys", "codes", "norms") if changes else ("keys", "codes"):
        held = cache.layers[0].kv.storage(what)
        assert str((*held.shape,)) in code[0] and f"empty_strided_cpu({(*held.shape,)}" not in code[0]


def test_short_rows_are_left_to_eager_steps():
    model = small()
    with FUSED.attach(model):
        cache, _ = prefilled(model, padding=(0, LENGTH - 5))
        assert not any(layer.ready for layer in cache.layers)
