"""`hashattn bench e2e`: what can be tested of it without a GPU, where steps run their specifications."""

import json

import pytest
import torch

from hashattn import FlatHamming, HashAttention, SimHash, TopK
from hashattn.cli import main
from hashattn.lab.bench import e2e, e2e_graphs, e2e_memory, tables
from hashattn.lab.bench.cuda_contenders import dense
from hashattn.lab.bench.e2e_attention import DenseLayers, make_caches
from hashattn.lab.bench.e2e_check import check_every_key, check_graph
from hashattn.lab.bench.e2e_model import Decoding, Llama, compile_layers, make_model
from hashattn.ops import decode
from tests.structured import raises_naming

TINY = Llama(2, 64, 4, 2, 64, 80, 50, torch.float32)
CPU = torch.device("cpu")
ATTN = HashAttention(SimHash(64), FlatHamming(), TopK(k=20))


def sdpa(q, keys, values):
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


class Replayed:
    """Stands for a CUDA graph: makes the calls again that it was made of."""

    def __init__(self, calls):
        self.calls = calls
        self.replay()

    def replay(self):
        for call in self.calls:
            call()


# ---- the model


def test_weights_and_tokens_take_what_is_counted():
    model = make_model(TINY, CPU)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == TINY.weight_bytes
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert Llama().weight_bytes == 2 * 8_030_261_248  # as Llama-3-8B
    caches = make_caches(ATTN, TINY, 3, 300, room=20, device=CPU)
    held = sum(c.storage(what).nbytes for c in caches for what in ("keys", "values", "codes"))
    assert 3 * 320 * TINY.token_bytes(SimHash(64)) == held + 3 * 320 * 4 * TINY.q_heads
    assert all(len(c) == c.encoded == 300 for c in caches)
    assert not torch.equal(caches[0].keys, caches[1].keys)


@torch.inference_mode()
def test_a_step_writes_the_next_token_in_place():
    decoding, seen = Decoding.of(make_model(TINY, CPU), 3, CPU), []

    def attend(layer, q, k, v):
        seen.append((layer, *(tuple(x.shape) for x in (q, k, v))))
        return q

    decoding.restart(41)
    token = decoding.token
    logits = decoding.step(attend)
    assert seen == [(i, (3, 4, 1, 64), (3, 2, 1, 64), (3, 2, 1, 64)) for i in range(2)]
    assert logits.shape == (3, 50)
    assert decoding.token is token and torch.equal(token[:, 0], logits.argmax(-1))
    assert decoding.position.item() == 42


@torch.inference_mode()
def test_decoding_in_place_is_what_the_model_does_with_a_cache_of_its_own():
    model = make_model(TINY, CPU)
    decoding, caches = Decoding.of(model, 2, CPU), [ATTN.new_cache(2, 2, 64) for _ in range(TINY.layers)]

    def attend(layer, q, k, v):
        caches[layer].append(k, v)
        return sdpa(q, caches[layer].keys, caches[layer].values)

    tokens = [decoding.token.clone()]
    for _ in range(5):
        logits = decoding.step(attend)
        tokens.append(decoding.token.clone())
    model.set_attn_implementation("eager")
    expected = model(torch.cat(tokens[:-1], 1)).logits[:, -1]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_layers_are_compiled_once_for_all_attention(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, right = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: right(self, **o, backend=counter))
    model = make_model(Llama(6, 64, 4, 2, 64, 80, 50, torch.float32), CPU)
    decoding = Decoding.of(model, 1, CPU)
    plain = decoding.step(lambda layer, q, k, v: q)
    compile_layers(model)

    def by_name(layer, q, k, v, name=""):
        return q

    caches = make_caches(ATTN, Llama(6, 64, 4, 2, 64, 80, 50, torch.float32), 1, 300, room=9, device=CPU)
    frames = []
    for attend in (by_name, lambda layer, q, k, v: q, DenseLayers(lambda q, *_: q, caches, 300)):
        decoding.restart(0)
        assert torch.equal(plain, decoding.step(attend))
        frames.append(counter.frame_count)
    assert frames[0] == frames[2] <= 6  # parts of a layer, before and after attention, and the last norm
    Decoding.of(model, 3, CPU).step(by_name)
    assert counter.frame_count == 2 * frames[0]  # sizes are constants


# ---- what fits


def test_the_largest_batch_is_what_fits_the_memory(monkeypatch):
    encoder, one = SimHash(64), e2e_memory.needed(Llama(), SimHash(64), 131072, 1)
    assert 36e9 < one < 39e9
    for free, most in ((one, 1), (e2e_memory.needed(Llama(), encoder, 131072, 3), 3), (84_900_000_000, 3)):
        monkeypatch.setattr(e2e_memory, "free_memory", lambda _, free=free: free)
        assert e2e_memory.plan(Llama(), encoder, [(131072, 9)], None, CPU)[-1] == (131072, 9, most)
        assert e2e_memory.plan(Llama(), encoder, [(131072, 9)], [most], CPU) == [(131072, 9, most)]
        raises_naming(ValueError, f"{most + 1} sequences of 131,072 keys", "GiB", f"at most {most} fit")(
            lambda most=most: e2e_memory.plan(Llama(), encoder, [(131072, 9)], [most + 1], CPU)
        )
    monkeypatch.setattr(e2e_memory, "free_memory", lambda _: one - 1)
    raises_naming(ValueError, "1 sequences of 131,072 keys", "take fewer keys")(
        lambda: e2e_memory.plan(Llama(), encoder, [(131072, 9)], None, CPU)
    )


# ---- the checks before it


@torch.inference_mode()
def test_layers_that_do_not_attend_to_every_key_are_not_measured():
    decoding, caches = Decoding.of(make_model(TINY, CPU), 2, CPU), make_caches(ATTN, TINY, 2, 299, room=9, device=CPU)
    check_every_key(decoding, {"it": DenseLayers(sdpa, caches, 300)}, caches, 300)
    wrongs = [
        lambda q, k, v: sdpa(q, k, v) * 1.001,
        lambda q, k, v: sdpa(q, k[:, :, 1:], v[:, :, 1:]),
        lambda q, k, v: sdpa(q, k[:, :, :-1], v[:, :, :-1]),
        lambda q, k, v: sdpa(q, k, v) * torch.nan,
    ]
    for wrong in wrongs:
        raises_naming(RuntimeError, "it, layer 0: the output is off by", "nothing is measured")(
            lambda wrong=wrong: check_every_key(decoding, {"it": DenseLayers(wrong, caches, 300)}, caches, 300)
        )


@torch.inference_mode()
def test_a_graph_that_does_something_else_is_not_measured():
    decoding, caches = Decoding.of(make_model(TINY, CPU), 2, CPU), make_caches(ATTN, TINY, 2, 299, room=9, device=CPU)
    attend = DenseLayers(sdpa, caches, 300)
    other = DenseLayers(lambda q, k, v: v[:, :, :1].repeat_interleave(2, 1), caches, 300)
    check_graph("it", decoding, attend, 300, lambda: decoding.step(attend))
    for replay in (lambda: decoding.step(other), lambda: decoding.step(attend) * torch.nan):
        raises_naming(RuntimeError, "it: the captured step is off by", "nothing is measured")(
            lambda replay=replay: check_graph("it", decoding, attend, 300, replay)
        )


# ---- all of it


def test_a_model_decodes_by_fused_steps_and_its_ratios_are_those_of_its_times(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(e2e, "kernels", lambda: "CUDA C++")
    monkeypatch.setattr(e2e_memory, "free_memory", lambda _: 5 << 30)
    monkeypatch.setattr(e2e, "FEW", 270)
    monkeypatch.setattr(e2e, "DENSE_LAYERS", (-1,))
    monkeypatch.setattr(e2e_graphs, "capture", Replayed)
    monkeypatch.setattr(e2e, "take_turns", lambda _, steps, *__: {name: 9.0 - i for i, name in enumerate(steps)})
    contenders = {"flash": dense()["SDPA flash"], "unserved": lambda q, k, v: q.no_such_thing}
    monkeypatch.setattr(e2e.cuda_contenders, "dense", lambda: contenders)
    result = e2e.run(e2e.Settings([(270, 20)], [2], pers=["kv_head"]), TINY, compiled=False, device="cpu")
    assert [note.split(":")[0] for note in result["notes"]] == ["unserved is left out"]
    (row,) = result["rows"]
    assert row["ms"] == {"flash": 9.0, "no attention": 8.0, "step": 7.0}
    assert (row["name"], row["dense"], row["dense_layers"]) == ("TopK per kv_head", "flash", [-1])
    assert row["kernels"] == "CUDA C++"
    assert (row["tokens_per_s"], row["dense_tokens_per_s"]) == (2e3 / 7, pytest.approx(2e3 / 9))
    assert (row["speedup"], row["ceiling"]) == (9 / 7, 9 / 8)


ROW = {
    "keys": 32768, "batch": 3, "name": "TopK per kv_head", "kernels": "CUDA C++", "dense_layers": [0, 1],
    "dense": "SDPA flash", "ms": {"SDPA flash": 20.0, "no attention": 9.0, "step": 10.0},
    "tokens_per_s": 300.0, "dense_tokens_per_s": 150.0, "speedup": 2.0, "ceiling": 2.222,
}  # fmt: skip


def test_the_table_has_a_line_a_case():
    head, line = tables.E2E.text([ROW]).splitlines()
    assert head.split()[:3] == ["keys", "batch", "composition"]
    cells = ["0,", "1", "SDPA", "flash", "150.0", "20.00", "300.0", "10.00", "2.00", "2.22"]
    assert line.split() == ["32,768", "3", "TopK", "per", "kv_head", "CUDA", "C++", *cells]


def test_the_command_writes_how_its_results_came_about(tmp_path, monkeypatch, capsys):
    asked = []
    result = {"compiled": False, "notes": ["a remark"], "rows": [ROW]}
    monkeypatch.setattr(e2e, "run", lambda *a, **o: asked.append((a, o)) or result)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    out = tmp_path / "x.json"
    assert main(["bench", "e2e", "--preset", "hata", "--no-compile", "--batch", "1", "3", "--out", str(out)]) == 0
    (((settings, size), options),) = asked
    assert (settings.sizes, settings.batches, settings.preset) == (e2e.KEYS, [1, 3], "hata")
    assert (size, options["compiled"]) == (Llama(), False)
    printed = capsys.readouterr().out
    assert "no prompt is read" in printed and "note: a remark" in printed
    written = json.loads(out.read_text())
    assert (written["device"], written["rows"]) == ("a GPU", [ROW])
    assert written["command"].startswith("hashattn bench e2e --preset hata")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "hata", "--bits", "64"], ["--preset hata has its own bits"]),
        (["--preset", "hat"], ["unknown preset", "hata"]),
        (["--preset", "magicpig"], ["does not serve magicpig"]),
        (["--keys", "600"], ["--keys", "'600'"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["--batch", "99"], ["99 sequences of 32,768 keys", "at most"]),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(e2e_memory, "free_memory", lambda _: 80 << 30)
    monkeypatch.setattr(e2e, "make_model", lambda *_: pytest.fail("measured"))
    assert main(["bench", "e2e", *arguments]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


@pytest.mark.parametrize("arguments", [["--preset", "hata"], ["--no-compile"]])
def test_what_only_a_model_is_measured_with_is_refused_without_one(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(["bench", "gpu", *arguments])
    assert end.value.code == 2 and f"unrecognized arguments: {arguments[0]}" in capsys.readouterr().err


def test_without_a_gpu_the_message_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "e2e"]) == 2
    assert "bench e2e needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_small_model_is_measured(compiled):
    size = Llama(4, 256, 8, 2, 64, 512, 1000)
    result = e2e.run(e2e.Settings([(4096, 200)], [2]), size, compiled=compiled, rounds=2)
    assert [row["name"] for row in result["rows"]] == ["TopK per query_head", "TopK per kv_head"]
    for row in result["rows"]:
        assert row["ms"]["no attention"] < row["ms"]["step"]
        assert row["ms"][row["dense"]] == min(
            ms for name, ms in row["ms"].items() if name.startswith(("SDPA", "Triton"))
        )
