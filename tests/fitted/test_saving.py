import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import struct
import threading
import time
from hashlib import sha256
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from hashattn import (
    ITQ,
    L2ALSH,
    PCA,
    AsymmetricHash,
    Calibration,
    Encoder,
    FlatHamming,
    HashAttention,
    HeavyChannels,
    MixedPrecision,
    ModelFacts,
    PerLayer,
    SpectralHash,
    SymmetricHash,
    TopK,
    from_pretrained,
    save_pretrained,
    saving,
    stored,
)
from hashattn.core.files import locked
from hashattn.ops.hamming import pack_bits
from tests.damage import refused, spoil_json, spoil_tensors
from tests.structured import qkv, raises_naming

FACTS = ModelFacts("small", "llama", 4, (0, 1, 2, 3), 4, 2, 16, {"rope_theta": 10000.0, "rope_type": "default"}, 97)
Q, K, V = qkv(0, tokens=8, keys=80)
MAKE = {
    "asymmetric": lambda **o: AsymmetricHash(65, query_hidden=(12,), query_bits=4, **o).fit(Q, K, steps=3, queries=4),
    "per head": lambda **o: AsymmetricHash(64, query_hidden=(), heads=2, **o).fit(Q, K, steps=3, queries=4),
    "symmetric": lambda **o: SymmetricHash(64, **o).fit(Q, K, steps=3, queries=4),
    "itq": lambda **o: ITQ(64, iterations=3, **o).fit(None, K),
}
makes = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def layers(make=MAKE["asymmetric"], numbers=(1, 3)):
    encoder = PerLayer({i: make(seed=i) for i in numbers}, FACTS)
    stored.round_weights(encoder)
    return encoder


def saved(folder, **options):
    return save_pretrained(options.pop("part", None) or layers(), folder, **options)


def codes(encoder):
    return encoder.encode_key(K), encoder.encode_query(Q)


@makes
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_loaded_encoder_encodes_exactly_as_the_saved_one(tmp_path, make, dtype):
    encoder = PerLayer({i: make(seed=i) for i in (1, 3)}, FACTS)
    before = encoder.layer(1).fits
    if dtype == "float16":
        stored.round_weights(encoder.layer(1))
        stored.round_weights(encoder.layer(3))
        assert encoder.layer(1).fits > before  # caches encode anew
    loaded = from_pretrained(save_pretrained(encoder, tmp_path / "new", dtype=dtype))
    assert loaded.encoder.layers == (1, 3)
    assert loaded.encoder.facts == loaded.facts == FACTS
    for i in (1, 3):
        assert type(loaded.encoder.layer(i)) is type(encoder.layer(i))
        assert stored.describe(loaded.encoder.layer(i)) == stored.describe(encoder.layer(i))
        for a, b in zip(codes(loaded.encoder.layer(i)), codes(encoder.layer(i)), strict=True):
            assert torch.equal(a, b)


def test_half_the_bytes_and_shared_weights_once(tmp_path):
    sizes = {}
    for make in ("symmetric", "per head"):
        for dtype in ("float16", "float32"):
            folder = saved(tmp_path / f"{make}{dtype}", part=PerLayer({0: MAKE[make]()}, FACTS), dtype=dtype)
            sizes[make, dtype] = (folder / "weights.safetensors").stat().st_size
    values = 64 * 16 + 2 * 16  # one map [D, bits] and a mean [Hkv, D]
    assert values * 2 < sizes["symmetric", "float16"] < values * 2 + 400
    assert values * 4 < sizes["symmetric", "float32"] < values * 4 + 400
    assert sizes["per head", "float16"] > 3 * values * 2


def test_files_may_be_read_by_whoever_reads_others(tmp_path):
    folder = saved(tmp_path / "a")
    (tmp_path / "other").write_text("")
    for name in ("config.json", "weights.safetensors"):
        assert (folder / name).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_was_fitted_on_comes_back_and_layers_without_encoders_are_dense(tmp_path):
    loaded = from_pretrained(saved(tmp_path / "a", fitted_on={"texts": ["a.txt"], "recall": {"1": 0.7}}))
    assert loaded.fitted_on == {"texts": ["a.txt"], "recall": {"1": 0.7}}
    assert loaded.dense_layers == (0, 2)
    assert (loaded.calibration.consensus, loaded.calibration.momentum, loaded.calibration.mixed) == (None, None, {})


def test_calibration_is_saved_with_a_composition_and_put_into_a_preset(tmp_path):
    encoder = layers()
    mixed = {i: MixedPrecision(hidden=h).fit(Q, K, encoder.layer(i), steps=3) for i, h in ((1, 4), (3, 0))}
    calibration = Calibration(consensus=3.0, momentum=1.5, mixed=mixed)
    attn = calibration.apply(HashAttention.from_preset("dashkv", pretrained=from_pretrained(saved(tmp_path / "bare"))))
    loaded = from_pretrained(save_pretrained(attn, tmp_path / "whole", dtype="float32"))
    assert (loaded.calibration.consensus, loaded.calibration.momentum) == (3.0, 1.5)
    again = HashAttention.from_preset("dashkv", pretrained=tmp_path / "whole", engine="reference")
    assert again.dense_layers == (0, 1, -1, 2)
    momentum = again.selector.ranked_part
    assert (momentum.discount.item(), momentum.inner.discount.item()) == (1.5, 3.0)
    for i in (1, 3):
        stage = again.layer(i).attend
        assert stage.a.item() == mixed[i].a.item()
        assert (stage.residual is None) == (i == 3)
        assert torch.equal(again.layer(i)(Q, K, V), attn.replace(engine="reference").layer(i)(Q, K, V))
    raises_naming(ValueError, "layer 0", "1, 3")(lambda: again.attend.layer(0))
    raises_naming(TypeError, "attn.layer(i)")(lambda: again.replace(encoder=encoder.layer(1))(Q, K, V))


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    mixed = {i: MixedPrecision(hidden=4).fit(Q, K, layers().layer(i), steps=1) for i in (1, 3)}
    saved(tmp_path / "a", calibration=Calibration(mixed=mixed))
    before = torch.get_rng_state()
    from_pretrained(tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = saved(tmp_path / "a", fitted_on="first")
    (folder / "left.txt").write_text("from the first")
    with pytest.raises(ValueError, match="JSON compliant"):
        saved(folder, fitted_on=float("nan"))
    assert from_pretrained(folder).fitted_on == "first"
    saved(folder, fitted_on="second")
    assert from_pretrained(folder).fitted_on == "second"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "left.txt", "weights.safetensors"]
    assert (folder / "left.txt").read_text() == "from the first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_other_folders_and_files_are_not_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        raises_naming(ValueError, name)(lambda name=name: saved(tmp_path / name))
    (tmp_path / "empty").mkdir()
    assert from_pretrained(saved(tmp_path / "empty")).facts == FACTS


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    def save(part, **options):
        return lambda: save_pretrained(part, tmp_path / "a", **options)

    made = MAKE["symmetric"]
    raises_naming(TypeError, "PerLayer", "SymmetricHash")(save(made()))
    raises_naming(ValueError, "facts_of")(save(PerLayer({1: made()})))
    raises_naming(ValueError, "not fitted", "SymmetricHash")(save(PerLayer({1: SymmetricHash(64)}, FACTS)))
    raises_naming(ValueError, "[7]", "[0, 1, 2, 3]")(save(PerLayer({7: made()}, FACTS)))
    raises_naming(ValueError, "2 KV heads", "8")(save(PerLayer({1: made()}, dataclasses.replace(FACTS, kv_heads=8))))
    raises_naming(ValueError, "dtype", "int8")(save(layers(), dtype="int8"))
    raises_naming(ValueError, "[1, 3]", "[1]")(save(layers(), calibration=Calibration(mixed={1: MixedPrecision()})))
    for value, words in ((torch.inf, "not finite"), (1e6, "float32")):
        encoder = PerLayer({1: made()}, FACTS)
        with torch.no_grad():
            encoder.layer(1).key_net.skip[0, 0, 0] = value
        raises_naming(ValueError, words, "skip")(save(encoder))
    assert not any(tmp_path.iterdir())


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config = {**config, name: value(config[name]) if callable(value) else value}
        if value is None:
            del config[name]
    path.write_text(json.dumps(config))


def cut(folder, by=7):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-by])


def scribble(folder):
    path = folder / "weights.safetensors"
    held = bytearray(path.read_bytes())
    held[-2] ^= 1
    path.write_bytes(held)


def reseal(folder, values=None, drop=None, add=None):
    """Change tensors and the hash with them: damage that the hash cannot tell."""
    from safetensors.torch import load_file, save_file

    path = folder / "weights.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if drop and drop in n]:
        del tensors[name]
    save_file(tensors | (values or {}) | (add or {}), path)
    edit(folder, weights_sha256=sha256(path.read_bytes()).hexdigest())


SKIP = "encoders.3.key_net.skip"
DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config cut short": (lambda f: (f / "config.json").write_text("{"), ["config.json", "cannot be read"]),
    "another format": (lambda f: edit(f, format_version=9), ["format_version", "9", "1"]),
    "not ours": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), ["format_version", "None"]),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ["format_version"]),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), ["weights.safetensors", "missing"]),
    "weights cut short": (cut, ["weights.safetensors", "cut short", "sha256"]),
    "one bit": (scribble, ["weights.safetensors", "damaged"]),
    "no hash": (lambda f: edit(f, weights_sha256=None), ["config.json", "weights_sha256"]),
    "another order of bits": (lambda f: edit(f, bit_order="big"), ["bit_order", "'big'"]),
    "before RoPE": (lambda f: edit(f, post_rope=False), ["post_rope", "False"]),
    "bits": (lambda f: edit(f, bits=128), ["128", "65"]),
    "facts": (lambda f: edit(f, model=lambda m: m | {"head_dim": 8}), ["layer 1", "[1, 16, 65]", "[1, 8, 65]"]),
    "no facts": (lambda f: edit(f, model={}), ["model facts"]),
    "an unknown class": (
        lambda f: edit(f, encoders=lambda e: e | {"3": {"class": "os.system", "arguments": {}}}),
        ["layer 3", "os.system", "AsymmetricHash"],
    ),
    "an unknown argument": (
        lambda f: edit(f, encoders=lambda e: e | {"3": {"class": "ITQ", "arguments": {"bit": 3}}}),
        ["layer 3", "ITQ", "bit"],
    ),
    "other arguments": (
        lambda f: edit(f, encoders=lambda e: {i: d | {"arguments": {"bits": 65}} for i, d in e.items()}),
        ["layer 1", "AsymmetricHash"],
    ),
    "a layer too many": (lambda f: edit(f, encoders=lambda e: e | {"2": e["1"]}), ["layer 2", "none"]),
    "a layer too few": (lambda f: edit(f, encoders=lambda e: {"1": e["1"]}), ["encoders.3."]),
    "no layer": (lambda f: edit(f, encoders="x"), ["config.json"]),
    "discount": (lambda f: edit(f, calibration=lambda c: c | {"consensus": "2"}), ["consensus", "'2'"]),
    "mixed": (lambda f: edit(f, calibration=lambda c: c | {"mixed": {"1": {"hidden": 2}}}), ["layer 1", "a"]),
    "infinite": (lambda f: reseal(f, {SKIP: torch.full((1, 16, 65), torch.inf)}), ["layer 3", "skip", "finite"]),
    "shape": (lambda f: reseal(f, {SKIP: torch.zeros(1, 16, 64)}), ["layer 3", "64", "65"]),
    "a tensor too few": (lambda f: reseal(f, drop=SKIP), ["layer 3", "key_net.skip"]),
    "a tensor too many": (lambda f: reseal(f, add={"more": torch.zeros(1)}), ["more"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("whole") / "a")


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_foreign_folders_are_refused_by_name(tmp_path, whole, damage, words):
    folder = tmp_path / "a"
    shutil.copytree(whole, folder)
    assert from_pretrained(folder).facts == FACTS
    damage(folder)
    raises_naming(ValueError, str(folder), *words)(lambda: from_pretrained(folder))


def test_a_header_that_promises_more_than_memory_holds_is_refused(tmp_path):
    folder = saved(tmp_path / "a")
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    edit(folder, weights_sha256=sha256((folder / "weights.safetensors").read_bytes()).hexdigest())
    raises_naming(ValueError, "weights.safetensors")(lambda: from_pretrained(folder))


def test_unknown_names_and_folders_say_what_there_is(tmp_path):
    raises_naming(ValueError, "'no-such-model'", "come with the library")(lambda: from_pretrained("no-such-model"))
    saved(tmp_path / "run" / "pretrained")
    raises_naming(ValueError, "config.json", "run/pretrained")(lambda: from_pretrained(tmp_path / "run"))


class Halves(nn.Module, Encoder):
    """A third party's encoder: signs of its first components, moved by a threshold."""

    def __init__(self, bits: int = 8):
        super().__init__()
        self.bits, self.threshold = bits, nn.Parameter(torch.zeros(bits))

    def encode_key(self, k, centre=None):
        return pack_bits(k[..., : self.bits] >= self.threshold)

    encode_query = encode_key


def test_third_party_encoders_come_through_entry_points_and_built_ins_win(tmp_path, monkeypatch):
    encoder = PerLayer({0: Halves(9)}, FACTS)
    raises_naming(ValueError, "Halves", "hashattn.encoders")(lambda: save_pretrained(encoder, tmp_path / "a"))
    found = [EntryPoint(n, f"{__name__}:{o}", "hashattn.encoders") for n, o in
             (("Halves", "Halves"), ("ITQ", "Halves"), ("Wrong", "saved"))]  # fmt: skip
    monkeypatch.setattr(stored, "entry_points", lambda group: [e for e in found if e.group == group])
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.value.split(":")[1]])
    with torch.no_grad():
        encoder.layer(0).threshold.fill_(0.25)
    loaded = from_pretrained(save_pretrained(encoder, tmp_path / "a"))
    assert torch.equal(loaded.encoder.layer(0).encode_key(K), encoder.layer(0).encode_key(K))
    assert stored.encoder_class("ITQ") is ITQ
    raises_naming(ValueError, "Wrong", "no encoder")(lambda: stored.encoder_class("Wrong"))


def test_a_class_that_only_shares_a_built_in_name_is_refused(tmp_path):
    other = type("ITQ", (Halves,), {})
    raises_naming(ValueError, "ITQ", "another class")(
        lambda: save_pretrained(PerLayer({0: other()}, FACTS), tmp_path / "a")
    )


def test_loaded_encoders_serve_a_composition(tmp_path):
    encoder = from_pretrained(saved(tmp_path / "a")).encoder
    attn = HashAttention(encoder, FlatHamming(), TopK(share=1.0), engine="reference")
    dense = HashAttention.from_preset("full")
    assert (attn.layer(3)(Q, K, V) - dense(Q, K, V)).abs().max() < 1e-5


@functools.cache
def ready(kind="asymmetric"):
    """Fitted once for all who only save it."""
    return layers(MAKE[kind])


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Folders of encoders of several classes, one with a calibration."""
    home = tmp_path_factory.mktemp("several")
    bias = AsymmetricHash(64, query_hidden=(), bias_bits=8).fit(Q, K, steps=2, queries=4)
    mixed = {1: MixedPrecision(hidden=4).fit(Q, K, ready().layer(1), steps=1)}
    made = {
        "asymmetric": PerLayer({1: ready().layer(1)}, FACTS), "bias": PerLayer({0: bias}, FACTS),
        "itq": PerLayer({0: MAKE["itq"](), 2: MAKE["itq"]()}, FACTS),
        **{n: PerLayer({0: e.fit(Q, K)}, FACTS) for n, e in {
            "alsh": L2ALSH(64), "spectral": SpectralHash(64), "pca": PCA(4), "channels": HeavyChannels(4),
        }.items()},
    }  # fmt: skip
    for name, part in made.items():
        save_pretrained(part, home / name, calibration=Calibration(1.0, None, mixed if name == "asymmetric" else {}))
    return home


@pytest.mark.parametrize("seed", range(20))
def test_damage_of_any_kind_is_a_value_error_and_takes_no_memory(several, tmp_path, seed):
    chance, refusals = random.Random(seed), 0
    for i in range(15):
        folder = tmp_path / str(i)
        shutil.copytree(chance.choice(sorted(several.iterdir())), folder)
        if chance.random() < 0.6:
            spoil_json(folder / "config.json", chance)
        else:
            spoil_tensors(folder / "weights.safetensors", chance)
            edit(folder, weights_sha256=sha256((folder / "weights.safetensors").read_bytes()).hexdigest())
        refusals += refused(lambda folder=folder: from_pretrained(folder))
    assert refusals >= 8  # what is changed in fitted_on and in weights' values is no damage that anybody can see


def test_numbers_that_ask_for_much_memory_are_refused_at_once(several, tmp_path):
    def asks(name, words, **changes):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        shutil.copytree(several / name, folder)
        edit(folder, **changes)
        began = time.perf_counter()
        raises_naming(ValueError, "config.json", *words)(lambda: refused(lambda: from_pretrained(folder), again=True))
        assert time.perf_counter() - began < 5

    def arguments(**more):
        return lambda encoders: {i: d | {"arguments": d["arguments"] | more} for i, d in encoders.items()}

    asks("asymmetric", ["query_net.weights.2"], encoders=arguments(query_hidden=[100_000, 100_000]))
    asks("asymmetric", ["query_net", "100000]"], encoders=arguments(query_hidden=[100_000]))
    asks("asymmetric", ["skip", "[1000000, 16, 65]"], encoders=arguments(heads=1_000_000))
    asks("asymmetric", ["query_hidden"], encoders=arguments(query_hidden=[10**12]))
    asks("asymmetric", ["hidden", "1000000000"], calibration=lambda c: c | {"mixed": {"1": {"hidden": 10**9}}})
    asks("alsh", ["powers"], encoders=arguments(powers=10**6))
    asks("itq", ["bits", "True"], encoders=arguments(bits=True))
    asks("itq", ["iterations", "True"], encoders=arguments(iterations=True))
    asks("pca", ["projection", "[2, 16, 1000000]"], encoders=arguments(components=10**6))
    asks("channels", ["heavy", "[2, 4]"], encoders=arguments(channels=5))
    asks("bias", ["key_bias"], encoders=arguments(bias_bits=0))
    for name, value in {"layers": 10**9, "head_dim": 10**6, "q_heads": 10**6, "kv_heads": 0}.items():
        asks("itq", [name, str(value)], model=lambda m, name=name, value=value: m | {name: value})
    asks("itq", ["q_heads", "kv_heads", "3"], model=lambda m: m | {"q_heads": 3})
    asks("itq", ["consensus", "True"], calibration=lambda c: c | {"consensus": True})
    asks("itq", ["encoders", "'01'"], encoders=lambda e: e | {"01": e["0"]})
    asks("itq", ["format_version", "True"], format_version=True)


@pytest.mark.parametrize(
    ("text", "word"),
    [("NaN", "NaN"), ("1e999", "1e999"), ("[" * 100_000, "nested"), ('{"a":' * 40 + "1" + "}" * 40, "nested"),
     ('{"a": 1, "a": 2}', "twice"), ('"\\ud800"', "surrogate"), ("1" * (5 << 20), "larger")],
)  # fmt: skip
def test_odd_json_is_refused(tmp_path, text, word):
    folder = saved(tmp_path / "a", fitted_on="@", part=ready())
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"@"', text))
    raises_naming(ValueError, "config.json", word)(lambda: from_pretrained(folder))
    path.write_bytes(b"\xff\xfe{}")
    raises_naming(ValueError, "config.json", "utf-8")(lambda: from_pretrained(folder))


def test_a_save_that_is_stopped_anywhere_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """Every step that changes a name is stopped once, before it is taken; then the folder is read and saved again."""
    new = {"fitted_on": "new", "part": ready("symmetric")}
    for stopped in range(4):
        folder = saved(tmp_path / str(stopped), fitted_on="old", part=ready())
        replace, steps = os.replace, iter(range(9))

        def stop(source, target, stopped=stopped, steps=steps, replace=replace):
            if next(steps) == stopped:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            with contextlib.suppress(KeyboardInterrupt):
                saved(folder, **new)
        found = from_pretrained(folder)
        assert found.fitted_on == ("old" if stopped < 2 else "new")
        kind = AsymmetricHash if found.fitted_on == "old" else SymmetricHash
        assert isinstance(found.encoder.layer(1), kind)
        assert from_pretrained(saved(folder, fitted_on="third", part=ready())).fitted_on == "third"
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.safetensors"]


def test_a_first_save_that_is_stopped_is_made_anew(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_json", stop)
        with contextlib.suppress(KeyboardInterrupt):
            saved(tmp_path / "a", part=ready())
    raises_naming(ValueError, "config.json")(lambda: from_pretrained(tmp_path / "a"))
    assert from_pretrained(saved(tmp_path / "a", part=ready())).facts == FACTS


def test_foreign_files_of_our_names_links_and_missing_folders(tmp_path):
    (tmp_path / "foreign").mkdir()
    for name, text in (("config.json", '{"model_type": "llama"}'), ("weights.safetensors", "theirs")):
        (tmp_path / "foreign" / name).write_text(text)
    raises_naming(ValueError, "foreign", "something else")(lambda: saved(tmp_path / "foreign", part=ready()))
    assert (tmp_path / "foreign" / "weights.safetensors").read_text() == "theirs"
    saved(tmp_path / "real", fitted_on="old", part=ready())
    (tmp_path / "link").symlink_to("real")
    saved(tmp_path / "link", fitted_on="new", part=ready())
    assert (tmp_path / "link").is_symlink() and from_pretrained(tmp_path / "real").fitted_on == "new"
    (tmp_path / "broken").symlink_to("nowhere")
    raises_naming(ValueError, "broken", "link")(lambda: saved(tmp_path / "broken", part=ready()))
    (tmp_path / "file").write_text("")
    raises_naming(NotADirectoryError, "file")(lambda: saved(tmp_path / "file" / "a", part=ready()))


def test_two_that_save_at_once_are_told(tmp_path):
    folder = saved(tmp_path / "a", part=ready())
    with locked(folder / saving.LOCK, "saving"):
        raises_naming(ValueError, str(folder), f"process {os.getpid()}")(lambda: saved(folder, part=ready()))
    assert from_pretrained(saved(folder, part=ready())).facts == FACTS


def test_whoever_reads_while_others_save_gets_one_or_the_other(tmp_path):
    folder, new = saved(tmp_path / "a", fitted_on="old", part=ready()), ready("symmetric")
    kinds = {"old": AsymmetricHash, "new": SymmetricHash}
    stop, found = threading.Event(), set()

    def save():
        while not stop.is_set():
            saved(folder, fitted_on="new", part=new)
            saved(folder, fitted_on="old", part=ready())

    writer = threading.Thread(target=save)
    writer.start()
    try:
        for read in range(200):
            if read >= 15 and len(found) == 2:
                break
            loaded = from_pretrained(folder)
            found.add(loaded.fitted_on)
            assert isinstance(loaded.encoder.layer(1), kinds[loaded.fitted_on])
    finally:
        stop.set()
        writer.join()
    assert found == {"old", "new"}
