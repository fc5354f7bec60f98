"""Steps with votes and a prior compiled, on a GPU, against their reference. Run with pytest -m gpu."""

from dataclasses import replace

import pytest
import torch

from hashattn.ops.decode import Before, Rule
from tests.ops.decode.cases import CALIBRATED_CASES, agrees, inputs, kept_before, moved, ready, same

pytestmark = pytest.mark.gpu
BOTH = {"vote_share": 0.4, "vote_discount": 2, "prior_ratio": 1.0, "prior_discount": 2}
LONG = [
    Rule(k=1024, **BOTH),
    Rule(share=0.02, critical=0.01, sinks=4, recents=64, **BOTH),
    Rule(k=512, shared=True, **BOTH),
]


@pytest.fixture(scope="module", params=["CUDA C++", "Triton"])
def decode(request):
    if request.param == "Triton":
        from hashattn.ops.decode.triton.decode import decode
    else:
        from hashattn.ops.decode.cuda.decode import decode
    return decode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "rule"), CALIBRATED_CASES)
def test_it_keeps_what_the_reference_keeps(decode, shape, rule, dtype):
    x = inputs(1, **shape, dtype=dtype)
    agrees(decode, moved(replace(x, before=kept_before(x, shared=rule.shared)), "cuda"), rule)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("rule", LONG, ids=str)
def test_long_rows(decode, rule, clustered):
    shape = {"kv_heads": 2, "dim": 128, "filled": 131_000, "room": 131_072, "clustered": clustered, "words": 2}
    x = inputs(2, **shape, dtype=torch.bfloat16)
    agrees(decode, moved(replace(x, before=kept_before(x, 1024)), "cuda"), rule)


@pytest.mark.parametrize("rule", [Rule(share=0.05, recents=8, **BOTH), Rule(k=64, shared=True, **BOTH)], ids=str)
def test_one_captured_step_serves_growing_lengths(decode, rule):
    x = inputs(3, filled=1000, room=4096)
    x = ready(moved(replace(x, before=kept_before(x)), "cuda"), rule)
    x.stored.keys.normal_(), x.stored.values.normal_()
    decode(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(x)
    for length in (1000, 1001, 1500, 4096, 3, 700):
        x.stored.length.fill_(length)
        graph.replay()
        assert same(captured, decode(ready(x, rule))), length


@pytest.mark.parametrize("filled", [1500, 40_000])
def test_layers_hand_on_their_keys_while_the_next_steps_start(decode, filled):
    x = inputs(6, kv_heads=8, dim=128, filled=filled, room=40_960, words=2, dtype=torch.bfloat16)
    x = ready(moved(x, "cuda"), Rule(share=0.02, sinks=4, recents=64, **BOTH), scale=0.1)
    steps = [(torch.randn_like(x.q), torch.randint_like(x.query, -(2**62), 2**62)) for _ in range(16)]

    def chain(wait=False):
        outs, before = [], None
        for q, query in steps:
            out = decode(replace(x, q=q, query=query, before=before))
            before = Before(out.ids, out.weights)
            outs.append(out)
            if wait:
                torch.cuda.synchronize()
        return outs

    expected = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(5):
        graph.replay()
        assert all(same(own, alone) for own, alone in zip(found, expected, strict=True))
