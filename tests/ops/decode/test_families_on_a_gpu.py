"""Steps of every family of scores on a GPU, against their specifications, also in CUDA graphs."""

from dataclasses import replace

import pytest
import torch

from hashattn.ops.decode import Rule
from hashattn.ops.decode.families import FAMILIES
from tests.ops.decode.families import CASES, FORCED, NAMES, agrees, inputs, moved

pytestmark = pytest.mark.gpu


def step(x):
    from hashattn.ops.select.prepare import prepare

    return prepare(x, FAMILIES[x.scores].in_triton(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_it_chooses_and_attends_as_its_specification_does(name, shape, rule, dtype):
    x = moved(inputs(name, rule, dtype=dtype, **shape), "cuda")
    agrees(step(x), x)


@pytest.mark.parametrize(("shape", "rule"), FORCED)
def test_keys_are_kept_for_their_position_without_scores(shape, rule):
    x = moved(inputs("positions", rule, dtype=torch.bfloat16, **shape), "cuda")
    agrees(step(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_many_keys(name):
    shape = {"kv_heads": 8, "group": 4, "dim": 128, "filled": 131_000, "room": 131_072, "dtype": torch.bfloat16}
    for rule in (Rule(k=1024, sinks=4, recents=64), Rule(k=1024, shared=True)):
        x = moved(inputs(name, rule, **shape), "cuda")
        agrees(step(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_follows_the_length(name):
    x = moved(inputs(name, Rule(share=0.05, recents=8), kv_heads=2, filled=3000, room=3072), "cuda")
    run, length = step(x), x.stored.length
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(x.q, x.query, x.scale, None)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x.q, x.query, x.scale, None)
    for filled in (3000, 1700, 40):
        length.fill_(filled)
        graph.replay()
        agrees(lambda *_, found=found: type(found)(*(y if y is None else y.clone() for y in found)),
               replace(x, bounds=torch.zeros_like(x.bounds)), hints=(None,))  # fmt: skip
