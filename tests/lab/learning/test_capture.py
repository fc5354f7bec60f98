import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hashattn.cli import main
from hashattn.integrations.transformers import capture as in_memory
from hashattn.lab.learning import Plan, Shards
from hashattn.lab.workload.texts import Text
from tests.integrations.models import make
from tests.lab.learning.small import PLAN, SHORT, TEXT, contents, save_letters, small_capture, small_model
from tests.structured import raises_naming

writing = sys.modules["hashattn.lab.learning.capture"]  # the package gives its name to the function


@pytest.fixture(scope="module")
def llama():
    return small_model()


@pytest.mark.parametrize(("name", "layers"), [("llama", (0, 1, 2, 3)), ("gemma3", (1, 3))])
def test_what_is_captured_is_what_the_layers_are_given(name, layers, tmp_path):
    model = small_model(name)
    before = model.config._attn_implementation
    shards = small_capture(tmp_path, PLAN, model)
    assert model.config._attn_implementation == before
    assert shards.layers == layers
    assert [s.name for s in shards.sequences] == ["text-000", "text-001", "needle-000", "multikey-000", "copy-000"]
    for i, sequence in enumerate(shards.sequences):
        # one dense prefill of all tokens, those included that the model wrote one by one
        exact = in_memory(model, shards.tokens(sequence).unsqueeze(0))
        for layer in layers:
            sample = shards.layer(layer)[i]
            assert sample.k.shape == (2, sequence.keys, 16)
            assert sample.q.shape == (6, 250, 16)
            assert (sample.prefill, sample.kind) == (sequence.tokens, sequence.name[:-4])
            for kept, true in ((sample.k, exact[layer].k[0]), (sample.q, exact[layer].q[0][:, sample.positions])):
                assert (kept - true).abs().max() < 2**-10 * true.abs().max()  # float16 keeps 11 bits


def test_the_model_writes_what_it_would_write(llama, tmp_path):
    shards = small_capture(tmp_path / "greedy", replace(SHORT, temperature=0.0), llama)
    for sequence in shards.sequences:
        tokens = shards.tokens(sequence)
        for column in range(sequence.tokens, sequence.keys):
            with torch.no_grad():
                logits = llama(input_ids=tokens[None, :column]).logits[0, -1]
            logits[96] = -torch.inf  # the end of the text, which never comes
            assert logits.argmax() == tokens[column]
    drawn = small_capture(tmp_path / "drawn", SHORT, llama)
    assert not torch.equal(drawn.tokens(drawn.sequences[0])[60:], shards.tokens(shards.sequences[0])[60:])


def test_queries_are_drawn_by_the_seed_and_the_important_ones_are_all_there(llama, tmp_path):
    shards = small_capture(tmp_path / "a", PLAN, llama)
    text, *_, copy = shards.layer(0)
    for sample in (text, copy):
        assert torch.equal(sample.positions, sample.positions.unique())  # ascending, no repetition
        assert len(sample.positions) == 250
    assert set(range(500, 503)) <= set(text.positions.tolist())
    assert text.positions[:-3].min() < 100 and text.positions[:-3].max() > 400
    letters = "".join(map(chr, shards.tokens(shards.sequences[-1]).tolist()))
    question = letters.index("\n\nQuestion:")
    assert set(range(question, len(letters))) <= set(copy.positions.tolist())

    other = small_capture(tmp_path / "b", replace(PLAN, seed=6), llama)
    assert not torch.equal(other.layer(0)[0].positions, text.positions)
    few = small_capture(tmp_path / "c", replace(PLAN, queries=1), llama).layer(0)
    assert few[0].positions.tolist() == [*range(500, 503)]
    assert few[-1].positions.tolist() == [*range(question, len(letters))]
    whole = small_capture(tmp_path / "d", replace(SHORT, queries=None), llama).layer(0)
    assert whole[0].positions.tolist() == [*range(63)]


def test_nothing_decoded_and_bfloat16(llama, tmp_path):
    plan = replace(SHORT, decode=0, dtype="bfloat16", layers=(2,))
    shards = small_capture(tmp_path, plan, llama)
    (sample, *_) = shards.layer(2)
    assert shards.layers == (2,)
    assert sample.k.shape[1] == sample.prefill == 60
    exact = in_memory(llama, shards.tokens(shards.sequences[0]).unsqueeze(0))[2].k[0]
    assert torch.equal(sample.k, exact.bfloat16().float())


def test_texts_take_turns_and_two_shares_or_seeds_have_nothing_in_common(llama, tmp_path):
    other = Text("other.txt", TEXT.content.upper())
    shards = small_capture(tmp_path / "a", replace(PLAN, sequences=3, decode=0), llama, (TEXT, other))
    texts, prompts = ["rooms.txt", "rooms.txt", "other.txt"], ["rooms.txt", "other.txt", "rooms.txt"]
    assert [s.source for s in shards.sequences] == texts + prompts
    assert len({s.seed for s in shards.sequences}) == 6
    seeds = {s.seed for s in small_capture(tmp_path / "b", replace(SHORT, seed=6), llama).sequences}
    assert not seeds & {s.seed for s in shards.sequences}
    for share, words in (((0.0, 0.3), "Room 2"), ((0.3, 0.6), "Room 6")):
        (part, *_) = small_capture(
            tmp_path / words, replace(SHORT, tokens=900, sequences=1, share=share), llama
        ).sequences
        read = "".join(map(chr, Shards.open(tmp_path / words).tokens(part).tolist()))
        assert words in read and "Room 100" not in read


def test_a_layer_is_written_before_the_next_one_attends(llama, tmp_path):
    found = {}

    def look(module, inputs):
        found.setdefault(module.layer_idx, sorted(path.name for path in tmp_path.rglob("layer*")))

    hooks = [layer.self_attn.register_forward_pre_hook(look) for layer in llama.model.layers]
    small_capture(tmp_path, replace(SHORT, sequences=1), llama)
    for hook in hooks:
        hook.remove()
    assert found == {i: [f"layer-{before:02d}.safetensors" for before in range(i)] for i in range(4)}


@pytest.mark.parametrize("after", [0, 1, 5, 9, 12, 26])  # of 27 files; 9 a sequence: 4 layers twice, then the tokens
def test_what_was_stopped_goes_on_to_the_same_bytes(after, llama, tmp_path, monkeypatch):
    small_capture(tmp_path / "whole", SHORT, llama)
    done, save = [], writing.save

    def dies(path, tensors, **notes):
        if len(done) == after:
            path.with_name(f".{path.name}").write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(path)
        save(path, tensors, **notes)

    monkeypatch.setattr(writing, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        small_capture(tmp_path / "stopped", SHORT, llama)
    monkeypatch.setattr(writing, "save", save)
    raises_naming(ValueError, "is missing" if after != 1 else "layer-0", "capture")(
        lambda: Shards.open(tmp_path / "stopped")
    )
    kept = {p: p.stat().st_mtime_ns for p in done[: after // 9 * 9]}
    small_capture(tmp_path / "stopped", SHORT, llama)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # what was whole is left alone


KILLED = """
import os, signal, sys
import hashattn.lab.learning
from hashattn.cli import main

writing, done = sys.modules["hashattn.lab.learning.capture"], []
save = writing.save

def dies(path, tensors, **notes):
    done.append(path)
    if len(done) == 12:
        path.with_name(f".{path.name}").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, tensors, **notes)

writing.save = dies
main(sys.argv[1:])
"""


def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path, capsys):
    model, text = tmp_path / "tiny", tmp_path / "rooms.txt"
    small_model().save_pretrained(model)
    save_letters(model)
    text.write_text(TEXT.content)
    command = ["capture", "--model", str(model), "--text", str(text), "--tokens", "90", "--sequences", "4",
               "--retrieval", "0", "--decode", "4", "--queries", "30", "--out"]  # fmt: skip
    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILLED, *command, str(out)], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = sorted(path.name for path in out.iterdir())
    assert left == [".capture.lock", "capture.json", "text-000", "text-001"]  # a lock that nobody holds any more
    for folder in (out, tmp_path / "whole"):
        assert main([*command, str(folder)]) == 0
    assert contents(out) == contents(tmp_path / "whole")
    said = capsys.readouterr()
    assert "tiny, 4 layers, 4 sequences, 376 tokens" in said.out
    assert "text-003" not in said.err  # no terminal: no bar
    described = json.loads((out / "capture.json").read_text())
    assert described["model"]["name"] == "tiny"
    assert described["sequences"][1] == {
        "name": "text-001", "kind": "text", "source": "rooms.txt", "tokens": 90, "asked": 90, "decoded": 4,
        "seed": 10001,
    }  # fmt: skip


def test_a_damaged_file_is_made_anew(llama, tmp_path):
    small_capture(tmp_path, SHORT, llama)
    whole = contents(tmp_path)
    path = tmp_path / "text-001" / "layer-02.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "text-002" / "tokens.safetensors").unlink()
    small_capture(tmp_path, SHORT, llama)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": replace(SHORT, queries=21)}, ["queries is 21 here and 20 there"]),
        ({"plan": replace(SHORT, share=(0.0, 0.5))}, ["share is [0.0, 0.5] here and [0.0, 1.0] there"]),
        ({"plan": replace(SHORT, layers=(1,))}, ["layers is [1] here and [0, 1, 2, 3] there"]),
        ({"plan": replace(SHORT, dtype="bfloat16")}, ["dtype is 'bfloat16' here and 'float16' there"]),
        ({"texts": (Text("rooms.txt", TEXT.content + "."),)}, ["texts is ['rooms.txt (sha256"]),
        ({"model": "qwen3"}, ["model's model_type is 'qwen3' here and 'llama' there"]),
        ({"name": "mine"}, ["model's name is 'mine' here and 'llama' there"]),
    ],
)
def test_other_arguments_for_the_same_folder_are_refused(change, words, llama, tmp_path):
    small_capture(tmp_path, SHORT, llama)
    before = contents(tmp_path)
    model = small_model(change["model"]) if "model" in change else llama
    raises_naming(ValueError, str(tmp_path), *words)(lambda: small_capture(tmp_path, **{**change, "model": model}))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"tokens": 3000, "sequences": 3}, ["'rooms.txt' has 5,", "3 sequences of 3,000 need 8,997"]),
        ({"tokens": 3000, "sequences": 0, "retrieval": 1, "share": (0, 0.1)}, ["the text has ", "fewer tokens"]),
        ({"tokens": 2040, "sequences": 1, "decode": 9}, ["2040", "2048 positions", "at most 2039"]),
        ({"layers": (1, 4)}, ["[0, 1, 2, 3]", "[4]"]),
        ({"layers": ()}, ["[0, 1, 2, 3]", "[]"]),
    ],
)
def test_what_cannot_be_captured_is_refused_before_anything_is_done(plan, words, llama, tmp_path):
    raises_naming(ValueError, *words)(lambda: small_capture(tmp_path / "new", replace(SHORT, **plan), llama))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"tokens": 1}, ["tokens", "1"]),
        ({"decode": -1}, ["decode", "-1"]),
        ({"sequences": 0, "retrieval": 0}, ["sequences=0", "retrieval=0"]),
        ({"sequences": 20000}, ["sequences", "20004"]),
        ({"queries": 0}, ["queries", "0"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"dtype": "float32"}, ["dtype", "float16", "float32"]),
        ({"share": (0.7, 0.4)}, ["0.7", "0.4"]),
    ],
)
def test_plans_that_make_no_sense_are_refused(plan, words):
    raises_naming(ValueError, *words)(lambda: Plan(**plan))


def test_no_text_is_refused(llama, tmp_path):
    raises_naming(ValueError, "texts")(lambda: small_capture(tmp_path, texts=(), model=llama))


def test_a_model_without_layers_to_capture_is_refused(tmp_path):
    model = make("mistral", vocab_size=256, sliding_window=8)
    raises_naming(ValueError, "MistralForCausalLM", "sliding")(lambda: small_capture(tmp_path / "new", model=model))
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_else_is_left_alone(llama, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    raises_naming(ValueError, str(tmp_path), "mine.txt")(lambda: small_capture(tmp_path, model=llama))
    raises_naming(ValueError, "mine.txt", "file")(lambda: small_capture(tmp_path / "mine.txt", model=llama))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_values_that_the_dtype_cannot_hold_are_named(tmp_path):
    model = small_model()
    model.model.layers[2].self_attn.k_proj.weight.data *= 1e7
    raises_naming(ValueError, "layer 2", "keys", "float16", "text-000", "bfloat16")(
        lambda: small_capture(tmp_path / "a", model=model)
    )
    small_capture(tmp_path / "b", replace(SHORT, dtype="bfloat16", sequences=1), model)
    model.model.layers[1].self_attn.q_proj.weight.data[3, 3] = torch.nan
    raises_naming(ValueError, "layer 1", "queries", "nan")(
        lambda: small_capture(tmp_path / "c", replace(SHORT, dtype="bfloat16"), model)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "1"], ["tokens must be at least 2, got 1"]),
        (["--from", "0.5", "--to", "0.5"], ["from < to", "0.5"]),
        (["--text", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        (["--text", "{tmp}/empty.txt"], ["empty.txt", "is empty"]),
        (["--out", "{tmp}"], ["holds other files", "empty.txt"]),
    ],
)
def test_the_command_refuses_bad_input_before_it_loads_a_model(options, words, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    given = [option.format(tmp=tmp_path) for option in options]
    assert main(["capture", "--model", "nobody/nothing", "--out", str(tmp_path / "new"), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hashattn capture: ") and said.count("\n") == 1
    assert all(word in said for word in words), said
    assert not (tmp_path / "new").exists()


def test_two_captures_into_one_folder_are_told_who_is_at_it(llama, tmp_path):
    small_capture(tmp_path / "a", SHORT, llama)
    whole = contents(tmp_path / "a")
    hold = (
        "import sys; from hashattn.core.files import locked\n"
        "with locked(sys.argv[1], 'capturing'): print(flush=True), sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "a" / ".capture.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        raises_naming(ValueError, str(tmp_path / "a"), f"process {other.pid} on ", "wait")(
            lambda: small_capture(tmp_path / "a", SHORT, llama)
        )
        other.kill()
    small_capture(tmp_path / "a", SHORT, llama)
    assert contents(tmp_path / "a") == whole
    (tmp_path / "link").symlink_to("nowhere")
    raises_naming(ValueError, "link", "broken")(lambda: small_capture(tmp_path / "link", SHORT, llama))
