import dataclasses

import pytest

from hashattn import FlatHamming, HashAttention, PerLayer, SymmetricHash, TopK
from hashattn.fitted.saving import from_pretrained, save_pretrained
from hashattn.integrations.transformers import capture, facts_of
from tests.integrations.models import TENTH, make, prompt, write
from tests.structured import raises_naming


def encoders(model, layers=None):
    kept = capture(model, prompt(1)["input_ids"], layers=layers, queries=8)
    return PerLayer({i: SymmetricHash(64).fit(c.q, c.k, steps=2, queries=4) for i, c in kept.items()}, facts_of(model))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_saved_encoders_serve_the_model_that_they_were_fitted_to(tmp_path, name):
    model = make(name)
    encoder = from_pretrained(save_pretrained(encoders(model), tmp_path / "a")).encoder
    assert encoder.layers == ((1, 3) if name == "gemma3" else (0, 1, 2, 3))
    attn = HashAttention.from_preset("hata", pretrained=tmp_path / "a", k=9, dense_layers=(), engine="cpu")
    with attn.attach(model) as handle:
        write(model, prompt(), eos_token_id=None)
        assert [i for i, row in enumerate(handle.report().layers) if row.sparse] == [*encoder.layers]


def test_dense_layers_need_no_encoder(tmp_path):
    model = make("llama")
    save_pretrained(encoders(model, layers=[2]), tmp_path / "a")
    attn = HashAttention.from_preset("hata", pretrained=tmp_path / "a", k=9, engine="cpu")
    assert attn.dense_layers == (0, 1, 3)
    with attn.attach(model) as handle:
        write(model, prompt(), eos_token_id=None)
        assert [row.sparse for row in handle.report().layers] == [0, 0, 11, 0]
    with pytest.raises(ValueError, match=r"layer 3 has no encoder.*dense_layers"):
        attn.replace(dense_layers=(0, 1)).attach(model)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("qwen3", {}), ["model_type is 'qwen3' here and 'llama' there"]),
        (("llama", {"num_hidden_layers": 3}), ["layers is 3 here and 4 there"]),
        (("llama", {"num_key_value_heads": 3}), ["kv_heads is 3 here and 2 there"]),
        (("llama", {"num_attention_heads": 4}), ["q_heads is 4 here and 6 there"]),
        (("llama", {"head_dim": 8}), ["head_dim is 8 here and 16 there"]),
        (("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}), ["rope", "500000.0", "10000.0"]),
    ],
)
def test_another_model_is_refused_with_both_values(other, words):
    encoder = encoders(make("llama"))
    model = make(other[0], **other[1])
    attn = TENTH.replace(encoder=encoder)
    for refused in (lambda: attn.attach(model), lambda: TENTH.attach(model, layers={1: attn})):
        raises_naming(ValueError, "fitted to", *words)(refused)
    with TENTH.attach(model) as handle:
        raises_naming(ValueError, *words)(lambda: handle.update(encoder=encoder))
        assert handle.attn is TENTH


def test_another_name_is_the_same_model():
    model = make("llama")
    encoder = encoders(model)
    encoder.facts = dataclasses.replace(encoder.facts, name="a copy")
    with HashAttention(encoder, FlatHamming(), TopK(k=9), engine="reference").attach(model) as handle:
        write(model, prompt(), eos_token_id=None)
        assert all(row.sparse for row in handle.report().layers)
