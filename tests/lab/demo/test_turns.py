"""Contenders take turns, another one first with every token; their times are told by medians."""

import pytest
import torch

from hashattn.lab.demo.turns import Decoding, take_turns
from hashattn.lab.steps import median_and_p99
from hashattn.lab.workload.model import sharing_weights


def test_another_contender_begins_with_every_token():
    class Turn:
        def __init__(self, name):
            self.name = name

        def step(self):
            order.append(self.name)

    order = []
    take_turns([Turn("a"), Turn("b"), Turn("c")], 4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_contenders_write_what_they_write_alone_each_on_its_own_model_and_cache():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    twin = sharing_weights(model)
    assert twin is not model and all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    first, second = (
        Decoding(each, transformers.DynamicCache(config=config), torch.tensor([[token]]))
        for each, token in ((model, 3), (twin, 5))
    )
    take_turns([first, second], 6)
    for decoding, token in ((first, 3), (second, 5)):
        alone = model.generate(torch.tensor([[token]]), max_new_tokens=6, do_sample=False, eos_token_id=-1)
        assert decoding.written == alone[0, 1:].tolist()
        assert len(decoding.seconds) == 6 and min(decoding.seconds) > 0
        assert decoding.cache.get_seq_length() == 6


@pytest.mark.parametrize(
    ("times", "expected"),
    [([3.0], (3.0, 3.0)), ([1.0, 2.0], (1.5, 1.99)), ([*range(101)], (50, 99)), ([5, 1], (3, 4.96))],
)
def test_median_and_p99(times, expected):
    assert median_and_p99(times) == pytest.approx(expected)
