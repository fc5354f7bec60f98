import json

from hashattn.core.model_facts import ModelFacts
from hashattn.integrations.transformers import facts_of
from tests.integrations.models import MODELS, make
from tests.structured import raises_naming


def test_facts_of_a_model_are_what_its_config_says():
    facts = facts_of(make("llama"), name="small")
    assert facts == ModelFacts(
        "small", "llama", 4, (0, 1, 2, 3), 6, 2, 16, {"rope_theta": 10000.0, "rope_type": "default"}, 97
    )


def test_only_layers_of_full_attention_count():
    facts = facts_of(make("gemma3"))
    assert (facts.layers, facts.attention_layers, facts.model_type) == (4, (1, 3), "gemma3_text")
    assert facts.rope["full_attention"]["rope_theta"] == 1e6


def test_every_model_equals_its_facts_read_back():
    for name in MODELS:
        facts = facts_of(make(name))
        assert ModelFacts.from_json(json.loads(json.dumps(facts.as_json()))) == facts


def test_models_of_one_shape_and_another_position_encoding_differ():
    near, far = (facts_of(make("llama", rope_parameters={"rope_type": "default", "rope_theta": t})) for t in (1e4, 5e5))
    assert "10000.0" in near.differences(far)[0]
    assert "500000.0" in near.differences(far)[0]


def test_a_name_leaves_folders_out(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "tiny")
    assert facts_of(type(model).from_pretrained(tmp_path / "tiny")).name == "tiny"
    assert facts_of(model).name == "llama"


def test_a_model_that_cannot_be_served_has_no_facts():
    model = make("mistral", sliding_window=8)
    raises_naming(ValueError, "MistralForCausalLM", "sliding")(lambda: facts_of(model))
