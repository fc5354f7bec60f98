import dataclasses
import json

import pytest

from hashattn.core.model_facts import ModelFacts
from tests.structured import raises_naming

FACTS = ModelFacts("small", "llama", 4, (1, 3), 6, 2, 16, {"rope_theta": 10000.0, "rope_type": "default"}, 97)


def test_facts_survive_json():
    assert ModelFacts.from_json(json.loads(json.dumps(FACTS.as_json()))) == FACTS
    bare = dataclasses.replace(FACTS, rope=None)
    assert ModelFacts.from_json(json.loads(json.dumps(bare.as_json()))) == bare


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_heads": 8}, "kv_heads is 2 here and 8 there"),
        ({"model_type": "qwen3"}, "model_type is 'llama' here and 'qwen3' there"),
        ({"rope": {"rope_theta": 5e5, "rope_type": "default"}}, "rope is"),
        ({"attention_layers": (0, 3)}, "attention_layers is (1, 3) here and (0, 3) there"),
    ],
)
def test_differences_name_both_values(change, words):
    (found,) = FACTS.differences(dataclasses.replace(FACTS, **change))
    assert words in found


def test_another_name_or_a_resized_vocabulary_is_the_same_model():
    assert FACTS.differences(dataclasses.replace(FACTS, name="other", vocab_size=100)) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, ["fields", "None"]),
        ({"name": "small"}, ["fields", "head_dim", "['name']"]),
        (FACTS.as_json() | {"more": 1}, ["fields", "more"]),
        (FACTS.as_json() | {"head_dim": "16"}, ["head_dim", "'16'"]),
        (FACTS.as_json() | {"layers": True}, ["layers", "True"]),
        (FACTS.as_json() | {"name": 3}, ["name", "3"]),
        (FACTS.as_json() | {"attention_layers": [1, 4]}, ["attention_layers", "[1, 4]"]),
        (FACTS.as_json() | {"rope": 3}, ["rope", "3"]),
    ],
)
def test_facts_that_are_none_are_refused(data, words):
    raises_naming(ValueError, *words)(lambda: ModelFacts.from_json(data))
