"""Decode steps of an attached model with a static cache, captured and compiled on a GPU. Run with pytest -m gpu."""

import pytest
import torch
import torch._dynamo
from transformers import StaticCache

from tests.integrations.models import CACHE, LENGTH, TENTH, TIERS, cache_of, make, prompt, write
from tests.ops.decode.encoding import same_norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # torch advises them
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),  # torch captures one to make a pool
]
BOTH = pytest.mark.parametrize("attn", [TENTH, TIERS], ids=["exact", "tiers"])
ROOM, TOKENS = LENGTH + 20, range(5, 13)


@pytest.fixture
def model():
    torch._dynamo.reset()
    yield make("llama", head_dim=64, num_hidden_layers=2).cuda()
    torch._dynamo.reset()


def prefilled(model):
    """A cache that holds a left-padded prompt, and the mask of all columns."""
    inputs, cache = prompt(), StaticCache(config=model.config, max_cache_len=ROOM)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ROOM - LENGTH), value=1).cuda()
    with torch.no_grad():
        model(input_ids=inputs["input_ids"].cuda(), attention_mask=mask[:, :LENGTH], **{CACHE: cache})
    return cache, mask


def ids_of(token):
    return torch.tensor([[token], [token + 1]], device="cuda")


@torch.no_grad()
def eager(model, attn):
    """Logits of eager steps that search, and those of eager dense ones."""
    found = []
    for plain in (attn, attn.replace(engine="dense")):
        with plain.attach(model):
            cache, mask = prefilled(model)
            found.append(
                [
                    model(input_ids=ids_of(token), attention_mask=mask[:, : LENGTH + i + 1], **{CACHE: cache}).logits
                    for i, token in enumerate(TOKENS)
                ]
            )
    return found


@BOTH
@torch.no_grad()
def test_one_captured_step_of_a_model_serves_growing_lengths(model, attn):
    expected, full = eager(model, attn)
    with attn.replace(engine="gpu").attach(model) as handle:
        cache, mask = prefilled(model)
        ids = ids_of(TOKENS[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(input_ids=ids, attention_mask=mask[:, : LENGTH + 1], **{CACHE: cache})
        torch.cuda.current_stream().wait_stream(stream)
        cache.crop(-1)
        handle.reset_report()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits
        for token, exact, dense in zip(TOKENS, expected, full, strict=True):
            ids.copy_(ids_of(token))
            graph.replay()
            assert (logits - exact).abs().max() < 1e-3 < (logits - dense).abs().max()
        assert int(cache.get_seq_length()) == LENGTH + len(TOKENS)
        assert [(row.sparse, row.engine) for row in handle.report().layers] == [(len(TOKENS), "gpu")] * 2
        for layer in cache.layers:
            layer.sync()
            assert layer.kv.encoded == LENGTH + len(TOKENS)
            if layer.kv.with_norms:
                same_norms(layer.kv.norms, layer.kv.keys, layer.kv.centre)
        for _ in range(ROOM - LENGTH - len(TOKENS) + 1):
            graph.replay()
        assert logits.isnan().all()
        with pytest.raises(ValueError, match=f"capacity is {ROOM} columns, but {ROOM + 1} were appended"):
            model(input_ids=ids, attention_mask=mask, **{CACHE: cache})


@BOTH
@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_one_compiled_step_of_a_model_serves_growing_lengths(model, mode, attn):
    expected, _ = eager(model, attn)
    with attn.replace(engine="gpu").attach(model):
        cache, mask = prefilled(model)
        forward = torch.compile(model.forward, fullgraph=True, mode=mode)
        for i, (token, exact) in enumerate(zip(TOKENS, expected, strict=True)):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                logits = forward(input_ids=ids_of(token), attention_mask=mask, **{CACHE: cache}).logits
            assert (logits - exact).abs().max() < 1e-3, i


@BOTH
def test_generate_with_a_static_cache_writes_the_same(model, attn):
    inputs = {name: x.cuda() for name, x in prompt().items()}
    options = {
        "cache_implementation": "static", "return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with attn.replace(engine="gpu").attach(model) as handle:
        expected = write(model, inputs, **options, disable_compile=True).sequences
        handle.reset_report()
        out = write(model, inputs, **options)
        assert torch.equal(out.sequences, expected)
        assert [(row.sparse, row.engine) for row in handle.report().layers] == [(11, "gpu")] * 2
        assert all(layer.ready for layer in cache_of(out).layers)
