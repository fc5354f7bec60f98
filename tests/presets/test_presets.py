import pytest
import torch
from torch import nn

from hashattn import PRESETS, AsymmetricHash, HashAttention, SymmetricHash
from hashattn.encoders.learned import LearnedHash
from hashattn.fitted.encoder_weights import encoder_class
from hashattn.presets import budget_options, options_of
from hashattn.presets.parsing import parse
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
    tokens = 1 if name == "h2o" else min(3, keys)  # its second query leaves out what the first one did not ask for
    q, k, v = qkv(1, keys=keys, tokens=tokens, dim=32)
    attn = forced(name, "reference")
    if name == "streaming":
        attn = HashAttention.from_preset(name, engine="reference", recent=1020)  # a window beyond every key
    if name == "oracle_topk":
        attn = HashAttention.from_preset(name, engine="reference", share=1.0)  # it has no centre to wait for
    keep = visible_mask(q.shape[2], keys, [0])
    assert (attn(q, k, v) - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)


PUBLISHED = {
    # Query MLP d-256-256-l, linear keys, three tiers, sinks and neighbours critical (2604.19351); readings differ in l.
    "dashkv": {
        "bits": 128, "t1": 0.05, "t2": 0.10, "sinks": 4, "recent": 64, "vote_share": 0.5, "encoder": None,
        "dense_layers": (0, 1, -1), "engine": "auto",
    },
    # 128 bits, the first two layers dense, one hash a KV head (2506.02572, section 3.1 and experiments).
    "hata": {"bits": 128, "k": 512, "dense_layers": (0, 1)},
    # MLPs of three layers to 32 bits (2412.14468); 128 sinks and 128 recent keys in the authors' code.
    "hashattention": {"bits": 32, "sinks": 128, "recent": 128},
    # 128 bits, the nearest 2% (2508.19740); layers 0 and 1 dense in the authors' evaluations.
    "spotlight": {"bits": 128, "share": 0.02, "hidden": 128, "dense_layers": (0, 1)},
    # K = 10, L = 150 (2410.16179); in the authors' code each 16th layer is dense, 4 sinks and 64 local keys exact.
    "magicpig": {"tables": 150, "bits": 10, "sinks": 4, "recent": 64, "dense_layers": (0, 16)},
    # m = 2 sub-vectors of b = 6 bits, a fifth of the keys (2407.12820); 32 sinks, no dense layer in the authors' runs.
    "pqcache": {"subquantisers": 2, "sub_bits": 6, "share": 0.2, "sinks": 32, "dense_layers": ()},
    # Pages of 16, the first two layers dense, nothing forced (2406.10774, experiments, and the authors' code).
    "quest": {"page": 16, "sinks": 0, "recent": 0, "dense_layers": (0, 1)},
    # One bit a dimension (2405.12497, the quantisation codes).
    "rabitq": {"bits": 0},
    # k_f = d_f = .25 of d = 128 (2406.02542, experiments); 16, 32 or 64 components in the authors' code.
    "loki": {"components": 32, "share": 0.25, "dense_layers": ()},
    # k = 128, r = 32 of 128, the l = k / 4 last keys among them (2312.04985, experiments).
    "sparq": {"channels": 32, "k": 128, "recent": 32, "dense_layers": ()},
    # 1/16 of the tokens (2408.07092, abstract); in the authors' code an eighth of 128 channels in 4 bits,
    # layers 0 and 1 dense.
    "double_sparsity": {"channels": 16, "share": 1 / 16, "dense_layers": (0, 1)},
    # p = .85 over Quest's pages of 16, the first two layers dense (2502.02770, and the authors' configurations).
    "twilight": {"p": 0.85, "page": 16, "share": 0.25, "dense_layers": (0, 1)},
    # 5% of the keys each for the top and for the first sample (2510.05688, and the authors' code).
    "vattention": {"share": 0.05, "tail": 0.05},
    # 4 sinks and a window, of the paper's sizes 4 + 1020 (2309.17453, experiments).
    "streaming": {"sinks": 4, "recent": 1020},
    # A fifth of the keys, half of it recent (2306.14048, experiments): ratios .1 and .1 in the authors' code.
    "h2o": {"share": 0.2},
    # A window of 64, means of 5 neighbours: the defaults of the authors' class (2404.14469).
    "snapkv": {"k": 1024, "window": 64, "pool": 5},
    # The same with a budget a layer, 1 / 20 of the mean in the last: the defaults of the authors' class (2406.02069).
    "pyramidkv": {"layers": 32, "window": 64, "pool": 5},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hyperparameters_are_the_defaults(name):
    options = options_of(name)
    assert {option: options.get(option) for option in PUBLISHED[name]} == PUBLISHED[name]
    attn = HashAttention.from_preset(name)
    if "dense_layers" in PUBLISHED[name]:
        assert attn.dense_layers == PUBLISHED[name]["dense_layers"]


def test_published_shapes_reach_the_parts():
    assert options_of("dashkv") == PUBLISHED["dashkv"]
    of = {name: HashAttention.from_preset(name) for name in PRESETS}
    assert isinstance(of["dashkv"].encoder, AsymmetricHash)
    assert of["dashkv"].encoder.query_hidden == (256, 256)
    assert of["dashkv"].encoder.key_hidden == ()
    assert isinstance(of["dashkv_symmetric"].encoder, SymmetricHash)
    assert (of["hata"].selector.k, of["hata"].selector.per, of["hata"].selector.combine) == (512, "kv_head", "sum")
    assert HashAttention.from_preset("hata", heads=2).encoder.heads == 2  # a hash for each KV head
    assert (of["hashattention"].encoder.query_hidden, of["hashattention"].encoder.bits) == ((128, 128), 32)
    assert of["double_sparsity"].encoder.label_bits == 4
    assert of["magicpig"].encoder.bits >= 1500
    assert of["h2o"].selector.recent == 0.5
    assert of["pyramidkv"].selector.beta == 20
    assert of["streaming"].selector.budget(10_000) == 1024


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("dashkv")])
def test_first_and_last_layers_are_dense_by_number(name):
    """Layers 0 to 4 and the last five of 32 (2604.19351, in one reading), and as many of another model's ends."""
    dense = HashAttention.from_preset(name, dense_layers=5).dense_layers
    assert {i % 32 for i in dense} == {0, 1, 2, 3, 4, 27, 28, 29, 30, 31}
    assert {i % 18 for i in HashAttention.from_preset(name, dense_layers=3).dense_layers} == {0, 1, 2, 15, 16, 17}
    assert HashAttention.from_preset(name, dense_layers=(2, -1)).dense_layers == (2, -1)
    assert parse(f"{name}:dense_layers=2")[1] == {"dense_layers": 2}
    for wrong in (0, -1, True, 0.5, "ends"):
        raises_naming(ValueError, "dense_layers", repr(wrong))(
            lambda wrong=wrong: HashAttention.from_preset(name, dense_layers=wrong)
        )


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
