import shutil

import pytest

from hashattn import (
    ITQ,
    AsymmetricHash,
    HashAttention,
    ModelFacts,
    PerLayer,
    SymmetricHash,
    from_pretrained,
    save_pretrained,
    saving,
    shipped,
)
from tests.structured import qkv, raises_naming

FACTS = ModelFacts("small", "llama", 5, (0, 1, 2, 3, 4), 4, 2, 16, None, 97)
MAKE = {
    "asymmetric": lambda: AsymmetricHash(64, query_hidden=(), query_bits=4),
    "symmetric": lambda: SymmetricHash(64),
}
SYMMETRIC = ("dashkv_symmetric", "hata")
ASYMMETRIC = (
    "dashkv",
    "dashkv_hash_only",
    "dashkv_consensus",
    "dashkv_momentum",
    "dashkv_fast",
    "hashattention",
    "spotlight",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    q, k, _ = qkv(0, tokens=8, keys=80)
    home = tmp_path_factory.mktemp("pretrained")
    for name, make in MAKE.items():
        encoder = PerLayer({i: make().fit(q, k, steps=2, queries=2) for i in (2, 3)}, FACTS)
        save_pretrained(encoder, home / name)
    save_pretrained(PerLayer({2: ITQ(64, iterations=2).fit(None, k)}, FACTS), home / "itq")
    return home


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "symmetric") for n in SYMMETRIC), *((n, "asymmetric") for n in ASYMMETRIC)]
)
def test_every_learned_preset_takes_fitted_encoders(folders, name, kind):
    attn = HashAttention.from_preset(name, pretrained=folders / kind)
    plain = HashAttention.from_preset(name)
    assert isinstance(attn.encoder, PerLayer) and attn.encoder.layers == (2, 3)
    assert (attn.encoder.bits, attn.encoder.query_bits) == (64, 4 if kind == "asymmetric" else 1)
    assert {i % 5 for i in attn.dense_layers} >= {0, 1, 4}  # which have no encoder
    assert attn.dense_layers[: len(plain.dense_layers)] == plain.dense_layers
    assert repr(attn.selector) == repr(plain.selector)
    assert "engine:" in str(attn.explain(q_heads=4, kv_heads=2, head_dim=16, keys=32768))
    q, k, v = qkv(1, keys=300)
    assert attn.replace(engine="reference").layer(2)(q, k, v).isfinite().all()


def test_options_of_the_preset_still_hold(folders):
    attn = HashAttention.from_preset("dashkv_fast", pretrained=folders / "asymmetric", share=0.2, sinks=1, bits=64)
    assert attn.selector.budget(1000) == 200


def test_an_encoder_of_another_kind_is_refused(folders):
    def build(name, folder):
        return lambda: HashAttention.from_preset(name, pretrained=folders / folder)

    raises_naming(ValueError, "'dashkv'", "AsymmetricHash", "SymmetricHash", "layer 2")(build("dashkv", "symmetric"))
    raises_naming(ValueError, "'hata'", "SymmetricHash", "AsymmetricHash")(build("hata", "asymmetric"))
    raises_naming(ValueError, "'dashkv_fast'", "ITQ")(build("dashkv_fast", "itq"))


@pytest.mark.parametrize("name", ["simhash_topk", "rabitq", "quest", "magicpig", "streaming", "oracle_topk", "full"])
def test_presets_that_learn_nothing_refuse_fitted_encoders(folders, name):
    raises_naming(ValueError, repr(name), "no encoder with weights")(
        lambda: HashAttention.from_preset(name, pretrained=folders / "asymmetric")
    )


def test_options_that_contradict_the_folder_are_refused(folders):
    def build(**options):
        return lambda: HashAttention.from_preset("dashkv_fast", pretrained=folders / "asymmetric", **options)

    raises_naming(ValueError, "bits=128", "bits=64", "leave it out")(build(bits=128))
    raises_naming(ValueError, "query_bits=2", "query_bits=4")(build(query_bits=2))
    raises_naming(ValueError, "encoder", "pretrained")(build(encoder=AsymmetricHash(64)))
    raises_naming(ValueError, "dense_layers=(0,)", "[1, 4]")(build(dense_layers=(0,)))
    raises_naming(TypeError, "did you mean 'pretrained'?")(lambda: HashAttention.from_preset("dashkv", pretraind="a"))
    raises_naming(ValueError, "no folder of fitted encoders")(
        lambda: HashAttention.from_preset("dashkv", pretrained="smollm2-36m")
    )


def test_encoders_that_come_with_the_library_go_by_name(folders, monkeypatch, tmp_path):
    shutil.copytree(folders / "asymmetric", tmp_path / "weights" / "tiny-model")
    monkeypatch.setattr(saving, "files", lambda package: tmp_path)
    assert list(shipped()) == ["tiny-model"]
    assert HashAttention.from_preset("dashkv", pretrained="tiny-model").encoder.facts == FACTS
    raises_naming(ValueError, "did you mean 'tiny-model'?")(lambda: from_pretrained("tiny-modl"))


def test_loaded_encoders_can_be_shared_by_presets(folders):
    loaded = from_pretrained(folders / "asymmetric")
    one, two = (HashAttention.from_preset(name, pretrained=loaded) for name in ("dashkv", "dashkv_fast"))
    assert one.encoder is two.encoder is loaded.encoder


@pytest.mark.parametrize("name", shipped())
def test_what_comes_with_the_library_is_whole_and_says_how_it_was_fitted(name):
    loaded = from_pretrained(name)
    assert loaded.facts.name == {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma-3-270M"}[name.split("-")[0]]
    assert loaded.fitted_on["recipe"]["loss"]
    held_out = loaded.fitted_on["held_out"]
    assert held_out["sequences"]
    assert min(layer["recall"] for layer in held_out["layers"].values()) > 0.45
    fast = name.endswith("-fast")
    attn = HashAttention.from_preset("dashkv_fast" if fast else "dashkv", pretrained=name)
    assert attn.encoder.layers == loaded.encoder.layers
    assert attn.encoder.query_bits == (2 if fast else 1)


def test_all_of_it_is_small():
    assert set(shipped()) == {f"{model}{kind}" for model in ("smollm2-135m", "gemma-3-270m") for kind in ("", "-fast")}
    assert sum(p.stat().st_size for folder in shipped().values() for p in folder.iterdir()) <= 12e6
