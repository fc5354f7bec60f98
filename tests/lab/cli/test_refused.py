"""What cannot be used is refused in one line, with status 2, before a model is loaded or anything is measured."""

import os
import shlex
import shutil

import pytest
import torch

from hashattn.cli import main, parser
from hashattn.core.errors import UserError
from hashattn.lab.bench import recall_data
from hashattn.lab.checks import PICTURES, check_file, check_folder, device_of
from hashattn.lab.demo import run as demo
from hashattn.lab.workload import model as loading
from tests.lab.evaluation.small import save
from tests.structured import raises_naming

CPU_BUILD = torch.version.cuda is None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a good text and broken ones, where loading a model fails the test."""
    for module in (loading, demo, recall_data):
        monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    (tmp_path / "text.txt").write_text("It was Ann. " * 400)
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\x02")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.gguf").write_bytes(b"GGU")
    (tmp_path / "folder" / "kept.md").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, command):
    """What a command says in its one line."""
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    name = " ".join(command[: 1 + (command[0] == "bench")])
    assert said.err.startswith(f"hashattn {name}: ") and said.err.count("\n") == 1, said.err
    return said.err


COMMANDS = {
    "demo": ["demo", "--text", "text.txt"],
    "eval": ["eval", "--text", "text.txt"],
    "capture": ["capture", "--text", "text.txt", "--out", "new"],
    "fit": ["fit", "nothing", "--out", "new"],
    "bench": ["bench", "cpu"],
    "recall": ["bench", "recall", "--text", "text.txt", "--data", "synthetic"],
    "generate": ["bench", "generate", "--device", "cpu"],
    "presets": ["presets"],
    "explain": ["explain"],
}
TEXTS, MODELS = ("demo", "eval", "capture"), ("demo", "eval", "capture")
CASES = [
    *(
        (name, ["--text", text], [text, *words])
        for name in TEXTS
        for text, words in (
            ("blank.txt", ["empty"]), ("binary.txt", ["zero bytes"]), ("latin.txt", ["UTF-8", "0xe9"]),
            ("nowhere.txt", ["cannot be read"]), ("folder", ["cannot be read"]),
        )
    ),
    *(
        (name, ["--model", model], [f"model='{model}'", *words])
        for name in MODELS
        for model, words in (
            ("folder", ["without config.json"]), ("cut.gguf", ["no GGUF", ".gguf"]), ("text.txt", ["no GGUF"]),
            ("no such/model/at all", ["no hub id"]),
        )
    ),
    *(
        (name, ["--device", device], [f"--device {device}", *words])
        for name in ("demo", "eval", "capture", "fit")
        for device, words in (("gpu0", ["no such device", "cuda:N"]), ("meta", ["cannot compute there"]), ("", ["cpu"]))
    ),
    ("explain", ["--device", "gpu0"], ["no such device"]),
    ("explain", ["--device", "meta"], ["cpu and cuda"]),
    *(
        (name, [option, target], [f"{option} {target}", *words])
        for name, option in (("demo", "--json"), ("eval", "--json"), ("eval", "--markdown"), ("bench", "--out"),
                             ("presets", "--json"), ("demo", "--plot"), ("recall", "--plot"))
        for target, words in (
            ("folder", ["is a folder"]), ("nowhere/x.png", ["no folder", "make it first"]), ("/dev/null", ["regular"]),
        )
    ),
    ("demo", ["--plot", "reads.docx"], ["--plot reads.docx", "ending", ".png"]),
    ("recall", ["--plot", "reads"], ["ending", ".png"]),
    ("eval", ["--plot", "text.txt"], ["--plot text.txt is a file"]),
    ("eval", ["--plot", "a/b"], ["no folder"]),
    *((["capture", "fit"][i], ["--out", "text.txt/a"], ["text.txt is a file"]) for i in (0, 1)),
    ("capture", ["--out", "folder"], ["holds other files", "kept.md"]),
    *((name, ["--preset", "pqcache"], ["PQ is not fitted", "hashattn fit --preset"]) for name in ("demo", "eval")),
    *((name, ["--preset", "dashcam"], ["unknown preset", "dashkv"]) for name in ("demo", "eval")),
    *((name, ["--preset", "hata:bit=3"], ["no option 'bit'", "'bits'"]) for name in ("demo", "eval")),
    ("explain", ["dashcam"], ["unknown preset"]),
    ("explain", ["magicpig", "--budget", "0.1"], ["--budget 0.1", "magicpig"]),
    ("explain", ["--dense-layers", "first"], ["dense layers must be"]),
    ("explain", ["--q-heads", "7"], ["multiple of kv_heads"]),
    ("explain", ["--keys", "0"], ["keys", "at least 1", "0"]),
    ("explain", ["dashkv_fast", "--encoder", "smollm2-135m-fast", "--head-dim", "128"], ["128"]),
    ("demo", ["--context", "0"], ["--context", "at least 1", "got 0"]),
    ("demo", ["--context", "-5"], ["--context", "got -5"]),
    ("demo", ["--question", " "], ["--question is empty"]),
    ("demo", ["--budget", "0"], ["budget", "got 0"]),
    ("demo", ["--budget", "nan"], ["budget", "nan"]),
    ("demo", ["--preset", "magicpig", "--budget", "0.1"], ["magicpig", "no budget"]),
    ("eval", ["--tokens", "0"], ["tokens must be at least 2, got 0"]),
    ("eval", ["--seeds", "-1"], ["seeds must be at least 0, got -1"]),
    ("eval", ["--windows", "0"], ["windows", "got 0"]),
    ("eval", ["--longbench", "binary.txt"], ["binary.txt"]),
    ("eval", ["--ruler", "nowhere.jsonl"], ["nowhere.jsonl"]),
    ("eval", ["--encoder", "folder"], ["folder", "config.json"]),
    ("capture", ["--queries", "0"], ["queries must be at least 1", "got 0"]),
    ("fit", [], ["'nothing' holds no capture", "hashattn capture"]),
    ("generate", ["--model", "folder"], ["without config.json"]),
    ("generate", ["--model", "smollm2-135m", "--layers", "2"], ["--layers cuts a --shape down", "smollm2-135m"]),
    ("generate", ["--layers", "0"], ["--layers must be at least 1, got 0"]),
    *(
        ("generate", [option, "0"], [f"{option} must be at least 1, got 0"])
        for option in ("--tokens", "--steps", "--batch", "--prefill-chunk")
    ),
    ("generate", ["--device", "gpu0"], ["no such device"]),
    ("generate", ["--out", "nowhere/x.json"], ["no folder"]),
    ("generate", ["--preset", "magicpig"], ["--preset magicpig", "budget of every key", "tables="]),
    ("generate", ["--preset", "pqcache"], ["PQ is not fitted"]),
    ("generate", ["--preset", "hata", "--preset", "hata"], ["--preset", "each once", "hata, hata"]),
    ("recall", ["--data", "folder"], ["without config.json"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more", "words"), CASES, ids=[f"{n} {' '.join(m)}" for n, m, _ in CASES])
def test_bad_input_is_refused_in_one_line_before_any_work(files, capsys, name, more, words):
    before = sorted(path.name for path in files.iterdir())
    said = refused(capsys, [*COMMANDS[name], *more])
    assert all(word in said for word in words), said
    assert sorted(path.name for path in files.iterdir()) == before  # nothing was made either


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "cpu"),
        ("--quiet --auto --threads 1 2", "cpu --quiet --auto --threads 1 2"),
        ("--device cpu --keys 600:50", "cpu --keys 600:50"),
        ("--device cuda --out x.json", "gpu --out x.json"),
        ("--clustered --device=cuda", "gpu --clustered"),
        ("--device cuda --kinds --per kv_head", "kinds --per kv_head"),
        ("--e2e --preset hata --no-compile", "e2e --preset hata --no-compile"),
        ("--crossover --batch 3", "crossover --batch 3"),
        ("--recall --index 'FlatPQ()' --data synthetic", "recall --index 'FlatPQ()' --data synthetic"),
    ],
)
def test_benchmarks_without_a_name_are_answered_with_the_command_that_has_it(capsys, old, new):
    assert main(["bench", *shlex.split(old)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"hashattn: bench takes the name of a benchmark: hashattn bench {new}\n"
    parser().parse_args(["bench", *shlex.split(new)])


def test_every_benchmark_has_its_own_options_only(capsys):
    for name, other in (("cpu", "--batch"), ("gpu", "--auto"), ("kinds", "--plot"), ("e2e", "--shape"),
                        ("crossover", "--keys"), ("recall", "--bits"), ("generate", "--keys")):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(["bench", name, other, "1"])
        assert end.value.code == 2 and f"unrecognized arguments: {other}" in capsys.readouterr().err


@pytest.mark.skipif(not CPU_BUILD, reason="torch is built with CUDA here")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
@pytest.mark.parametrize("name", ["demo", "eval", "capture", "fit"])
def test_cuda_on_a_cpu_build_names_the_build(files, capsys, name, device):
    said = refused(capsys, [*COMMANDS[name], "--device", device])
    assert f"--device {device}" in said and torch.__version__ in said and "built without CUDA" in said


def test_a_gpu_beyond_those_that_are_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    raises_naming(UserError, "cuda:7", "sees no GPU")(lambda: device_of("cuda:7"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    raises_naming(UserError, "cuda:7", "2 GPUs", "cuda:0 to cuda:1")(lambda: device_of("cuda:7"))
    assert device_of("cuda:1") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")


@pytest.mark.parametrize("argument", [["--budget", "2"], ["--budget", "0"], ["--budget", "much"]])
@pytest.mark.parametrize("name", ["eval", "explain"])
def test_a_budget_that_is_no_share_says_what_would_be(files, capsys, name, argument):
    with pytest.raises(SystemExit) as end:
        main([*COMMANDS[name], *argument])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "0.05, or own" in said and repr(argument[1]) in said


@pytest.mark.parametrize("damaged", ["cut weights", "no weights", "no tokenizer", "config", "header", "empty"])
@pytest.mark.parametrize("name", ["eval", "capture"])
def test_a_damaged_model_is_named_without_a_traceback(model, tmp_path, monkeypatch, capsys, name, damaged):
    folder = shutil.copytree(model, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    if damaged == "cut weights":
        os.truncate(weights, 5000)
    elif damaged == "empty":
        os.truncate(weights, 0)
    elif damaged == "header":
        weights.write_bytes(b"\xff" * 64)
    elif damaged == "no weights":
        weights.unlink()
    elif damaged == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        (folder / "config.json").write_text("{")
    (tmp_path / "text.txt").write_text("It was Ann. " * 400)
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, [*COMMANDS[name], "--model", str(folder)])
    assert f"model='{folder}' cannot be loaded (" in said


def test_a_truncated_gguf_is_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x05\x00\x00\x00\x00\x00\x00\x00" * 4)
    (tmp_path / "text.txt").write_text("It was Ann. " * 400)
    monkeypatch.chdir(tmp_path)
    assert "cut.gguf' cannot be loaded (" in refused(capsys, [*COMMANDS["eval"], "--model", "cut.gguf"])


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("demo", ["--context", "1001"], ["context must be from 1 to 984", "1024 positions", "1001"]),
        ("demo", ["--context", "20"], ["no room for the text"]),
        ("eval", ["--tokens", "1020"], ["at most 864", "1024 positions", "1020"]),
        ("eval", ["--tokens", "800", "--windows", "9"], ["text.txt", "9 sequences"]),
        ("eval", ["--tokens", "300", "--layers", "9"], ["layers must be among", "9"]),
        ("capture", ["--tokens", "1020", "--sequences", "1"], ["1024 positions", "at most"]),
        ("capture", ["--tokens", "100", "--layers", "9"], ["layers must be among", "9"]),
    ],
)
def test_what_only_the_model_can_tell_is_refused_before_it_runs(
    model, tmp_path, monkeypatch, capsys, name, more, words
):
    (tmp_path / "text.txt").write_text("It was Ann. " * 400)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "prefill", lambda *_, **__: pytest.fail("the text is read"))
    command = [*COMMANDS[name], "--model", str(model), *more]
    assert main(command if name != "demo" else [*command, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "new").exists()


def test_targets_that_can_be_written_pass_and_nothing_is_left(tmp_path):
    check_file("json", None)
    check_file("json", "-", stdout=True)
    check_file("json", str(tmp_path / "x.json"))
    for ending in PICTURES:
        check_file("plot", str(tmp_path / f"x{ending.upper()}"), PICTURES)
    check_folder("out", str(tmp_path / "a" / "b"))
    (tmp_path / "there.json").write_text("{}")
    check_file("json", str(tmp_path / "there.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    raises_naming(UserError, "--plot", "'-'")(lambda: check_file("plot", "-"))
    raises_naming(UserError, "--json", "''")(lambda: check_file("json", ""))
    raises_naming(UserError, "too long")(lambda: check_file("json", str(tmp_path / ("x" * 300))))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no folder here that nobody can write to")
def test_folders_that_cannot_be_written_to_are_named():
    for check in (lambda: check_file("json", "/proc/x.json"), lambda: check_folder("out", "/proc/a")):
        raises_naming(UserError, "/proc cannot be written to", "name another place")(check)


def test_the_endings_are_those_that_matplotlib_knows():
    from matplotlib.figure import Figure

    assert {ending[1:] for ending in PICTURES} <= set(Figure().canvas.get_supported_filetypes())
