"""Encoders of presets, fitted layer by layer to what was captured."""

import json

import pytest
import torch

from hashattn import HashAttention, PerLayer, from_pretrained
from hashattn.cli import main
from hashattn.encoders.learned import LearnedHash
from hashattn.fitted.encoder_weights import reseeded
from hashattn.lab.bench.recall_entries import arguments
from hashattn.lab.learning.fit import fit_layers, held_out
from hashattn.lab.learning.recipe import SHAPE, Recipe
from hashattn.lab.learning.shards import Shards
from hashattn.lab.recall import recall_and_mass
from hashattn.presets.parsing import parse
from tests.integrations.models import make as make_model
from tests.lab.learning.shards import FACTS, LAYERS, make
from tests.structured import qkv, raises_naming

unfitted = pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
PRESETS = {  # floors of the recall on held-out sequences, .05 by chance; beside each what the worst layer reaches
    "alsh:bits=64": 0.15,  # .194
    "dashkv_fast:bits=32": 0.38,  # .436
    "double_sparsity:channels=8": 0.18,  # .228
    "hashattention": 0.3,  # .349
    "hata:bits=32": 0.3,  # .353
    "itq:bits=32,query_bits=2": 0.29,  # .338
    "loki:components=8": 0.33,  # .389
    "pqcache:subquantisers=8,sub_bits=4": 0.47,  # .524
    "spectral:bits=32": 0.08,  # .114
    "spotlight:bits=32,hidden=8": 0.31,  # .358
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return Shards.open(make(tmp_path_factory.mktemp("captured") / "shards"))


def recipe(preset, **options):
    return Recipe(preset=preset, **{"steps": 20, "queries": 8, "every": 10, "lr": 1e-2, **options})


@pytest.mark.parametrize("preset", PRESETS)
def test_the_encoder_of_a_preset_is_fitted_saved_and_taken_by_it(shards, tmp_path, preset):
    asked = recipe(preset)
    saved = fit_layers(shards, tmp_path / "out", asked)
    loaded, (name, options) = from_pretrained(saved), parse(preset)
    plain, attn = (HashAttention.from_preset(name, **options, **more) for more in ({}, {"pretrained": loaded}))
    assert isinstance(attn.encoder, PerLayer) and attn.encoder.layers == LAYERS
    kept = held_out(shards, asked.held_out)
    for layer in LAYERS:
        encoder = attn.encoder.layer(layer)
        assert arguments(encoder) == arguments(plain.encoder)
        record = json.loads((tmp_path / "out" / f"layer-{layer:02d}.json").read_text())
        samples = [s for s in shards.layer(layer) if s.name in kept]
        found = recall_and_mass(encoder, samples, index=attn.index, budget=0.05)
        assert found == pytest.approx((record["recall"], record["mass"]))
        assert record["recall"] >= PRESETS[preset]
    q, k, v = qkv(0, keys=150)
    assert attn.replace(engine="reference").layer(4)(q, k, v).isfinite().all()


@unfitted
def test_layers_start_from_seeds_of_their_own_where_there_is_something_to_draw():
    asked = recipe("itq:bits=32", seed=3)
    assert [asked.make(i, 2).seed for i in (0, 4)] == [30_000, 30_004]
    assert recipe("loki:components=8").make(4, 2).components == 8
    encoder = HashAttention.from_preset("hashattention").encoder
    assert isinstance(encoder, LearnedHash)
    other = reseeded(encoder, 7)
    assert (other.seed, other.key_hidden, other.bits) == (7, (128, 128), 32)
    assert torch.equal(
        other.encode_key(torch.ones(1, 2, 1, 16)), reseeded(encoder, 7).encode_key(torch.ones(1, 2, 1, 16))
    )


def test_the_command_fits_a_preset_and_says_how_to_use_it(shards, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["fit", str(shards.folder), "--preset", "pqcache:subquantisers=8,sub_bits=4", "--out", str(out)]
    assert main([*arguments, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f'from_preset("pqcache", subquantisers=8, sub_bits=4, pretrained="{out / "pretrained"}")' in said
    assert main([*arguments, "--device", "cpu"]) == 0  # done: nothing is fitted again
    assert main([*arguments[:3], "pqcache:subquantisers=4,sub_bits=4", *arguments[4:]]) == 2
    assert "subquantisers=8,sub_bits=4' there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "quest"}, ["quest", "nothing to fit", "Identity"]),
        ({"preset": "streaming"}, ["streaming", "nothing to fit"]),
        ({"preset": "pqcach"}, ["pqcache"]),
        ({"preset": "pqcache:subquantisers"}, ["subquantisers", "option=value"]),
        ({"preset": "dashkv:pretrained=smollm2-135m"}, ["fitted already", "pretrained"]),
        *(({"preset": "hata", name: value}, [name, repr(value), "preset='hata'"])
          for name, value in zip(SHAPE, ("itq", 64, 8, (), 4, "kv"), strict=True)),
    ],
)  # fmt: skip
def test_a_preset_that_cannot_be_fitted_is_refused_by_name(options, words):
    raises_naming(ValueError, *words)(lambda: Recipe(**options))


def test_codes_that_are_no_bits_are_not_calibrated(shards, tmp_path):
    def fit():
        fit_layers(shards, tmp_path / "out", recipe("loki:components=8"), calibrate=True)

    raises_naming(ValueError, "calibrate", "PCA")(fit)
    assert not (tmp_path / "out").exists()


def test_an_option_that_contradicts_what_was_fitted_is_refused(shards, tmp_path):
    saved = fit_layers(shards, tmp_path / "out", recipe("loki:components=8"), layers=[1])
    raises_naming(ValueError, "components=4", "components=8")(
        lambda: HashAttention.from_preset("loki", components=4, pretrained=saved)
    )
    assert from_pretrained(saved).facts == FACTS


def test_a_model_is_not_attached_with_what_has_still_to_be_fitted():
    model = make_model()
    attn = HashAttention.from_preset("loki", components=8)
    raises_naming(RuntimeError, "PCA", "not fitted", "hashattn fit --preset")(lambda: attn.attach(model))
    with HashAttention.from_preset("streaming").attach(model):
        pass
