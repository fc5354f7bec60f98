"""torch.compile of the decode step: the graph breaks at every search, the tokens are the same."""

import os
import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from tests.integrations.models import ON_CPU, cache_of, check_codes, forward, make, prompt, write


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend):
    counter = CompileCounterWithBackend(backend)
    model.forward = torch.compile(model.forward, backend=counter)
    return counter


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llama", "dynamic"), ("gemma3", "static")],
)
def test_a_compiled_model_writes_the_same(name, implementation):
    model = make(name, num_hidden_layers=2 if name == "gemma3" else 1)  # one of full attention
    options = {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    options |= {} if implementation == "dynamic" else {"cache_implementation": "static"}
    with ON_CPU.attach(model) as handle:
        expected = write(model, prompt(), **options).sequences
        counter = compiled(model, "eager")
        out = write(model, prompt(), **options)
        assert torch.equal(out.sequences, expected)
        check_codes(cache_of(out))
        graphs = counter.frame_count
        assert graphs > 0
        assert torch.equal(write(model, prompt(), **options).sequences, expected)
        assert counter.frame_count == graphs  # lengths are not compiled in
        assert handle.report().layers[-1].sparse == 33


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
def test_steps_compiled_by_inductor_are_the_same():
    model = make(num_hidden_layers=1)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with ON_CPU.attach(model):
        for cache in caches:
            forward(model, prompt(1)["input_ids"], cache)
        expected = [forward(model, torch.tensor([[token]]), caches[0]) for token in (5, 6, 7)]
        compiled(model, "inductor")
        for token, logits in zip((5, 6, 7), expected, strict=True):
            assert (forward(model, torch.tensor([[token]]), caches[1]) - logits).abs().max() < 1e-5
        check_codes(caches[1])
