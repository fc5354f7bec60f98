"""Checked drafts on a GPU: graphs of drafts and of checks. Run with pytest -m gpu."""

import pytest
import torch

from hashattn.integrations.attached.clock import CudaClock, clock_of
from hashattn.integrations.transformers.graphs import FIRST
from hashattn.integrations.transformers.lossless.draft import Draft
from tests.integrations.lossless import cache, clock, same_cache
from tests.integrations.models import TENTH, check_codes, make, prompt, write

pytestmark = pytest.mark.gpu
FUSED = TENTH.replace(engine="gpu", dense_layers=(0,))
WAYS = {
    "greedy": (2, {}),
    "one row": (1, {}),
    "sampling": (2, {"do_sample": True, "temperature": 0.8}),
    "penalties": (2, {"repetition_penalty": 1.3}),
    "static": (2, {"cache_implementation": "static"}),
    "outgrown": (2, {"max_new_tokens": 150}),
}


@pytest.fixture
def model():
    return make("llama", head_dim=64, num_hidden_layers=3, initializer_range=0.04).cuda()


def text(model, rows, **options):
    given = {name: x.cuda() for name, x in prompt(rows).items()}
    plain = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, "disable_compile": True}
    torch.manual_seed(5)
    return write(model, given, return_dict_in_generate=True, **{**plain, **options})


@pytest.mark.parametrize("graph", ["never", "auto"])
@pytest.mark.parametrize("way", WAYS)
def test_the_model_writes_what_it_writes_alone(model, monkeypatch, way, graph):
    clock(monkeypatch)
    rows, options = WAYS[way]
    expected = text(model, rows, **options)
    state = torch.cuda.get_rng_state()
    with FUSED.attach(model, check="dense", draft=4, graph=graph) as handle:
        found, report = text(model, rows, **options), handle.report()
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    same_cache(cache(found), cache(expected))
    check_codes(cache(found))
    assert report.drafts.passes > 3 and 0 < report.drafts.fidelity < 1
    if graph == "auto":
        assert report.graph.replayed > report.drafts.passes and report.graph.eager.keys() <= {FIRST}, report.graph


def test_lengths_follow_the_devices_own_clock(model, monkeypatch):
    assert isinstance(clock_of(torch.device("cuda")), CudaClock)
    guess = Draft._guess
    monkeypatch.setattr(Draft, "_guess", lambda *given: (guess(*given) + 1) % 97)
    expected = text(model, 2, max_new_tokens=200)
    with FUSED.attach(model, check="dense", draft=5) as handle:
        assert torch.equal(text(model, 2, max_new_tokens=200).sequences, expected.sequences)
        use = handle.report().drafts
    assert use.plain > use.passes and use.drafting > 0 and use.checking > 0
