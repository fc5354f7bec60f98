import pytest
import torch
from torch import nn

from hashattn import PRESETS, AsymmetricHash, HashAttention, SymmetricHash
from hashattn.encoders.learned import LearnedHash
from hashattn.presets import budget_options, options_of
from hashattn.stored import encoder_class
from tests.structured import attention64, cones, poison, qkv, raises_naming, tolerance, visible_mask

pytestmark = pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
names = pytest.mark.parametrize("name", PRESETS)
# they wait for no centre: even a short row is searched
SEARCH_AT_ONCE = ("itq", "spectral", "alsh", "pqcache", "quest", "loki", "sparq", "double_sparsity", "twilight")


def forced(name: str, engine: str, **options: object) -> HashAttention:
    """The preset with an engine; what cannot encode before it is fitted is fitted to cones."""
    if "engine" in options_of(name):
        options["engine"] = engine
    attn = HashAttention.from_preset(name, **options)
    if not isinstance(attn.encoder, nn.Module) or isinstance(attn.encoder, LearnedHash):
        return attn
    data = cones(7)
    return attn.replace(encoder=attn.encoder.fit(data.q, data.k))


@names
def test_every_preset_builds_documents_its_paper_and_prints(name):
    attn = HashAttention.from_preset(name)
    assert repr(attn).startswith("HashAttention(")
    assert PRESETS[name].__name__ == name
    assert "engine:" in str(attn.explain(q_heads=8, kv_heads=2, head_dim=64, keys=32768))


@names
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_rows_alone_and_in_a_padded_batch_agree(name, engine):
    q, k, v = qkv(0, 2, keys=600, dim=32)
    start = torch.tensor([0, 170])
    attn = forced(name, engine)
    together = (
        attn(q, poison(k, start), poison(v, start), start=start) if name != "full" else attn(q, k, v, start=start)
    )
    alone = attn(q[1:], k[1:, :, 170:], v[1:, :, 170:])
    tol = tolerance(q, k, v, visible_mask(1, 600, [0, 170]))
    assert together.isfinite().all()
    assert (together[1:] - alone).abs().max() <= tol
    assert (together[:1] - attn(q[:1], k[:1], v[:1])).abs().max() <= tol


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in SEARCH_AT_ONCE])
@pytest.mark.parametrize("keys", [1, 30, 258])
def test_short_rows_attend_densely_and_exactly(name, keys):
    q, k, v = qkv(1, keys=keys, tokens=min(3, keys), dim=32)
    attn = forced(name, "reference")
    if name == "streaming":
        attn = HashAttention.from_preset(name, engine="reference", recent=1020)  # a window beyond every key
    if name == "oracle_topk":
        attn = HashAttention.from_preset(name, engine="reference", share=1.0)  # it has no centre to wait for
    keep = visible_mask(q.shape[2], keys, [0])
    assert (attn(q, k, v) - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)


def test_published_hyperparameters_are_the_defaults():
    assert options_of("dashkv") == {
        "bits": 128, "t1": 0.05, "t2": 0.10, "sinks": 4, "recent": 64, "vote_share": 0.5, "encoder": None,
        "dense_layers": (0, 1, -1), "engine": "auto",
    }  # fmt: skip
    assert isinstance(HashAttention.from_preset("dashkv").encoder, AsymmetricHash)
    assert HashAttention.from_preset("dashkv").encoder.query_hidden == (256, 256)
    assert HashAttention.from_preset("hata").selector.k == 512
    assert isinstance(HashAttention.from_preset("dashkv_symmetric").encoder, SymmetricHash)
    assert HashAttention.from_preset("hashattention").encoder.bits == 32


def test_options_reach_the_parts():
    attn = HashAttention.from_preset("dashkv", bits=64, t1=0.2, t2=0.4, dense_layers=(), engine="cpu")
    assert attn.encoder.bits == 64
    assert (attn.dense_layers, attn.engine) == ((), "cpu")
    assert attn.selector.critical(1000) == 200
    assert HashAttention.from_preset("dashkv_momentum", share=0.2, sinks=1).selector.budget(1000) == 200
    assert HashAttention.from_preset("hashattention", heads=4).encoder.heads == 4


def test_the_ablations_add_one_part_each():
    hash_only, consensus, momentum = (
        HashAttention.from_preset(f"dashkv_{n}").selector.ranked_part for n in ("hash_only", "consensus", "momentum")
    )
    assert consensus.inner == hash_only
    assert momentum.inner.inner == hash_only


@pytest.mark.parametrize(
    ("error", "name", "options", "words"),
    [
        (ValueError, "dash-kv", {}, ["'dash-kv'", "did you mean 'dashkv'?"]),
        (ValueError, "simhash", {}, ["'simhash'", "did you mean 'simhash_topk'?"]),
        (ValueError, "zzzzzzzz", {}, ["'zzzzzzzz'", "dashkv", "full"]),
        (TypeError, "dashkv", {"bit": 64}, ["'dashkv'", "'bit'", "did you mean 'bits'?"]),
        (TypeError, "full", {"share": 0.1}, ["'full'", "'share'"]),
        (TypeError, "dashkv_symmetric", {"vote_shar": 0.1}, ["'vote_shar'", "vote_share"]),
        (TypeError, "dashkv_momentum", {"recents": 9}, ["'recents'", "'recent'"]),
        (ValueError, "simhash_topk", {"bits": 5}, ["bits", "5"]),
    ],
)
def test_unknown_presets_and_options_are_refused_with_the_nearest_name(error, name, options, words):
    raises_naming(error, *words)(lambda: HashAttention.from_preset(name, **options))


def test_every_option_of_a_wrapping_preset_can_be_given():
    assert HashAttention.from_preset("dashkv_consensus", bits=64, sinks=1, recent=2).encoder.bits == 64
    assert HashAttention.from_preset("dashkv_symmetric", bits=64, t1=0.2, t2=0.3).encoder.bits == 64


def test_messages_read_as_sentences():
    message = raises_naming(ValueError)(lambda: HashAttention.from_preset("zzzzzzzz"))
    assert "'zzzzzzzz' There" not in message


def test_every_budget_reaches_its_preset():
    for name in PRESETS:
        if name in ("full", "magicpig"):
            raises_naming(ValueError, repr(name), "budget")(lambda n=name: budget_options(n, 0.1, 1000))
            continue
        attn = HashAttention.from_preset(name, **budget_options(name, 0.1, 10_000))
        most = 2000 if name == "pyramidkv" else 1000  # its lowest layer keeps more, its highest less
        assert 1000 <= attn.selector.budget(10_000) <= most, name


def test_installed_packages_add_presets(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from hashattn import ExactAttend, FlatHamming, HashAttention, SimHash, TopK\n"
        "def theirs(*, bits=64, share=0.1):\n"
        "    return HashAttention(SimHash(bits), FlatHamming(), TopK(share=share), ExactAttend())\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hashattn.presets]\ntheirs = theirs:theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert HashAttention.from_preset("theirs", bits=128).encoder.bits == 128
    raises_naming(TypeError, "'theirs'", "'bit'", "'bits'")(lambda: HashAttention.from_preset("theirs", bit=128))
    raises_naming(ValueError, "'their'", "'theirs'")(lambda: HashAttention.from_preset("their"))


def test_a_broken_preset_names_its_package_and_the_others_still_serve(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "from hashattn import HashAttention\n"
        "number = 3\n"
        "def none(): return None\n"
        "def refuses(*, k=0): raise ValueError('k must be at least 1')\n"
        "def fails(): return {}['missing']\n"
        "def works(): return HashAttention.from_preset('streaming')\n"
    )
    (tmp_path / "unimportable.py").write_text("import nothing_of_this_name\n")
    info = tmp_path / "broken_presets-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-presets\nVersion: 2.5\n")
    points = {n: f"broken:{n}" for n in ("number", "none", "refuses", "fails", "works", "absent")}
    points |= {"unimportable": "unimportable:any", "nowhere": "no_such_module:any"}
    lines = "\n".join(f"{n} = {where}" for n, where in points.items())
    (info / "entry_points.txt").write_text(
        f"[hashattn.presets]\n{lines}\n[hashattn.encoders]\nTheirs = unimportable:E\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, error, words in (
        ("unimportable", ImportError, ["nothing_of_this_name"]), ("nowhere", ImportError, ["no_such_module"]),
        ("absent", ImportError, ["absent"]), ("number", TypeError, ["3", "no preset"]),
        ("none", TypeError, ["None", "no HashAttention"]), ("refuses", ValueError, ["k must be at least 1"]),
        ("fails", RuntimeError, ["KeyError", "missing"]),
    ):  # fmt: skip
        raises_naming(error, "broken-presets 2.5", repr(name), *words)(lambda n=name: HashAttention.from_preset(n))
    assert HashAttention.from_preset("works").selector == HashAttention.from_preset("streaming").selector
    raises_naming(ValueError, "'wrks'", "'works'", "unimportable")(lambda: HashAttention.from_preset("wrks"))
    raises_naming(ImportError, "broken-presets 2.5", "'Theirs'")(lambda: encoder_class("Theirs"))
