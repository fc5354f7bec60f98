"""How commands end: by signals, full disks and readers that go away; and a fault of the library is shown as one."""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hashattn import __version__
from hashattn.cli import main
from hashattn.core.errors import Failure, UserError, refusals
from hashattn.lab.bench import cpu
from hashattn.lab.evaluation import run as evaluation
from hashattn.lab.learning import fit as fitting
from hashattn.lab.learning.shards import Shards
from hashattn.lab.stopping import Terminated, stoppable
from tests.lab.evaluation.small import save
from tests.lab.learning.shards import make
from tests.structured import raises_naming

capturing = importlib.import_module("hashattn.lab.learning.capture")  # the package names the function so

EVAL = ["eval", "--presets", "simhash_topk:bits=32", "--tokens", "300", "--windows", "1", "--rows", "perplexity",
        "--sparse", "4", "--budget", "0.5", "--text", "text.txt", "--model", "small"]  # fmt: skip
CAPTURE = ["capture", "--tokens", "60", "--sequences", "3", "--retrieval", "0", "--decode", "0", "--text", "text.txt",
           "--model", "small", "--out", "captured"]  # fmt: skip
FIT = ["fit", "shards", "--out", "fitted", "--bits", "32", "--query-hidden", "8", "--steps", "10", "--queries", "8",
       "--every", "5", "--device", "cpu"]  # fmt: skip
BENCH = ["bench", "cpu", "--shape", "4/2x16:float32", "--keys", "600:50", "--rounds", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, a text and shards."""
    folder = tmp_path_factory.mktemp("work")
    save(folder / "small")
    (folder / "text.txt").write_text("It was Ann. " * 400)
    make(folder / "shards")
    return folder


@pytest.fixture
def work(folder, tmp_path, monkeypatch):
    """The same in a folder that is new for each test."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said_in_one_line(capsys, start):
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(start), line
    return line


def signalled(number, function, after):
    """The function, but that the process is sent a signal when it was called so often before."""
    calls = []

    def calling(*arguments, **options):
        calls.append(1)
        if len(calls) == after + 1:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return calling


# ---- signals


@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_stopped_capture_says_what_is_whole_and_goes_on(work, monkeypatch, capsys, number, name, status):
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "_record", signalled(number, capturing._record, 2))
        assert main(CAPTURE) == status
    line = said_in_one_line(capsys, f"hashattn capture: stopped by {name}: 2 of 3 sequences are whole in captured")
    assert "the same command goes on" in line
    assert main(CAPTURE) == 0
    assert len(Shards.open("captured").sequences) == 3


def test_a_stopped_fit_says_what_is_whole_and_goes_on(work, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fit_layer", signalled(signal.SIGTERM, fitting.fit_layer, 1))
        assert main(FIT) == 143
    line = said_in_one_line(capsys, "hashattn fit: stopped by SIGTERM: 1 of 3 layers are fitted in fitted")
    assert "the same command goes on" in line
    assert main(FIT) == 0
    assert (work / "fitted" / "pretrained" / "config.json").is_file()


@pytest.mark.parametrize("command", [CAPTURE, FIT])
def test_one_that_is_stopped_before_it_wrote_anything_says_so(work, monkeypatch, capsys, command):
    place = (capturing, "claim") if command is CAPTURE else (fitting, "held_out")
    monkeypatch.setattr(*place, signalled(signal.SIGTERM, getattr(*place), 0))
    assert main(command) == 143
    said_in_one_line(capsys, f"hashattn {command[0]}: stopped by SIGTERM: nothing was written yet")


def test_a_stopped_evaluation_and_benchmark_say_that_nothing_was_written(work, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "judge", signalled(signal.SIGTERM, evaluation.judge, 1))
    assert main([*EVAL, "--json", "x.json"]) == 143
    said_in_one_line(capsys, "hashattn eval: stopped by SIGTERM: nothing was written; the same command begins anew")
    monkeypatch.setattr(cpu, "read_bandwidth", signalled(signal.SIGINT, lambda: 1e10, 0))
    assert main([*BENCH, "--out", "x.json"]) == 130
    said_in_one_line(capsys, "hashattn bench cpu: stopped by Ctrl-C: nothing was written; the same command begins anew")
    assert not (work / "x.json").exists()


def test_a_process_that_is_sent_sigterm_ends_with_143_and_one_line(work):
    code = """
import importlib, os, signal, sys
from hashattn.cli import main
capturing = importlib.import_module("hashattn.lab.learning.capture")
capturing._record = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run([sys.executable, "-c", code, *CAPTURE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr.splitlines()[-1].startswith("hashattn capture: stopped by SIGTERM: 0 of 3 sequences")
    assert "Traceback" not in done.stderr


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 1)
    assert signal.getsignal(signal.SIGTERM) == before


# ---- disks and readers


@pytest.fixture
def full_disk():
    """No file may grow beyond a number of bytes, as on a full disk: writing more is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("target", [["--json", "x.json"], ["--markdown", "x.md"]])
def test_where_results_cannot_be_written_they_are_shown_all_the_same(work, capsys, full_disk, target):
    full_disk(100)
    status = main([*EVAL, *target])
    said = capsys.readouterr()
    assert status == 1
    assert "perplexity ratio" in said.out  # hours of work are not lost
    assert said.err.startswith("hashattn eval: ") and "File too large" in said.err and said.err.count("\n") == 1
    assert not [path for path in work.iterdir() if "x." in path.name]  # and no half of a file is left


def test_a_capture_on_a_full_disk_keeps_what_is_whole(work, monkeypatch, capsys, full_disk):
    wrote = capturing._record

    def record(*arguments):
        full_disk(resource.RLIM_INFINITY if not list(work.glob("captured/*/tokens*")) else 500)
        return wrote(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(capturing, "_record", record)
        assert main(CAPTURE) == 1
    full_disk(resource.RLIM_INFINITY)
    assert "File too large" in said_in_one_line(capsys, "hashattn capture: ")
    assert len(list(work.glob("captured/*/tokens.safetensors"))) == 1
    assert main(CAPTURE) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_standard_output_is_said_and_a_reader_that_goes_away_is_not():
    full = 'python -m hashattn presets > /dev/full; echo "full $?" >&2'
    pipe = 'python -m hashattn presets | true; echo "piped ${PIPESTATUS[0]}" >&2'
    for line, expected in (
        (full, ["hashattn presets: standard output: No space left on device", "full 1"]),
        (pipe, ["piped 141"]),
    ):
        script = line.replace("python", sys.executable)
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.stderr.splitlines() == expected


# ---- faults


@pytest.mark.parametrize("fault", [ValueError, TypeError, RuntimeError, KeyError, AssertionError, ImportError])
def test_a_fault_of_the_library_shows_its_traceback_and_asks_for_a_report(work, monkeypatch, capsys, fault):
    def broken(*_, **__):
        raise fault("of our own")

    monkeypatch.setattr(evaluation, "judge", broken)
    assert main(EVAL) == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "in broken" in said
    last = said.splitlines()[-1]
    assert last.startswith("hashattn eval: this is a fault of hashattn") and "report it" in last
    assert "hashattn eval --presets" in last and f"hashattn {__version__}" in last and torch.__version__ in last


def test_failures_have_a_status_of_their_own_and_no_traceback(work, monkeypatch, capsys):
    for error, words in (
        (Failure("it diverged"), "it diverged"),
        (MemoryError(), "more memory than there is"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), "fewer tokens"),
        (OSError(28, "No space left on device", "x.bin"), "x.bin: No space left on device"),
    ):
        monkeypatch.setattr(evaluation, "judge", lambda *_, e=error, **__: (_ for _ in ()).throw(e))
        assert main(EVAL) == 1
        assert words in said_in_one_line(capsys, "hashattn eval: ")


def test_debug_shows_the_traceback_of_what_is_refused(work):
    with pytest.raises(UserError, match="unknown preset"):
        main(["explain", "dashcam", "--debug"])


def test_only_the_named_errors_become_the_users(capsys):
    with pytest.raises(KeyError), refusals(ValueError):
        raise KeyError("a")
    with pytest.raises(UserError, match=r"no\.txt: No such file"), refusals():
        Path("no.txt").read_text()
    with pytest.raises(Failure), refusals():
        raise Failure("as it is")
    raises_naming(ValueError, "that")(lambda: (_ for _ in ()).throw(UserError("that")))


# ---- machine-readable output


def test_json_on_standard_output_is_nothing_else(work, monkeypatch, capsys):
    assert main([*EVAL, "--json", "-"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["versions"]["hashattn"] == __version__ and result["rows"]
    assert "perplexity ratio" in said.err  # the table is for people
    monkeypatch.setattr(cpu, "_COLD", 1 << 20)
    monkeypatch.setattr(cpu, "read_bandwidth", lambda: 1e10)
    assert main([*BENCH, "--out", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"][0]["keys"] == 600 and "x dense" in said.err


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    root = Path(__file__).parents[3]
    script = "import sys; from hashattn_command import main; sys.exit(main())"  # as pip writes it
    done = subprocess.run(
        [sys.executable, "-c", script, "presets"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "hashattn: stopped by Ctrl-C: nothing was done yet\n"


def test_what_cannot_be_downloaded_ends_a_command_in_what_to_do(work, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    arguments = [word for word in EVAL if word not in ("--text", "text.txt")]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "could not be downloaded" in said and "put the file into a folder and name that in PIP_FIND_LINKS" in said
