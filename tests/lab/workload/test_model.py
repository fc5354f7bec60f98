"""Loading: the demo's model comes whole, and what cannot be loaded is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoTokenizer

from hashattn.lab.workload import model as loading
from hashattn.lab.workload.model import load, name_of
from tests.lab.learning.small import save_letters, small_model
from tests.structured import raises_naming

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def test_the_demo_model_and_its_end_of_text(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.float32 and not model.training
    assert model.config.num_hidden_layers == 30
    assert tokenizer.eos_token_id == model.config.eos_token_id == 2


def test_a_hub_id_out_of_reach_is_named() -> None:
    with pytest.raises(ValueError, match=r"model='nobody/nothing' cannot be loaded .* give a \.gguf file"):
        load("nobody/nothing")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ValueError, match=r"is a file but no \.gguf"):
        load(path)


def test_models_are_called_by_their_names(tmp_path: Path) -> None:
    assert name_of(None) == name_of("smollm2-135m") == "SmolLM2-135M-Instruct"
    assert name_of("gemma-3-270m") == "Gemma-3-270M"
    assert name_of("org/model") == "org/model"
    (tmp_path / "mine").mkdir()
    assert name_of(tmp_path / "mine") == name_of(f"{tmp_path}/mine/") == "mine"


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A cache folder of its own, and a conversion that makes a tiny model; the list has an entry for each."""
    made: list[int] = []

    def convert(source: Path, dtype: torch.dtype) -> object:
        made.append(1)
        save_letters(tmp_path / "letters")
        return small_model(), AutoTokenizer.from_pretrained(tmp_path / "letters")

    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(loading, "fetch", lambda asset: tmp_path / "model.gguf")
    monkeypatch.setattr(loading, "_from_gguf", convert)
    return made


def test_a_converted_copy_is_checked_and_made_again_when_it_is_damaged(converted: list[int], tmp_path: Path) -> None:
    first = load()[0].state_dict()
    (copy,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    assert copy.name == "SmolLM2-135M-Instruct.Q4_1.b179c952"

    def right() -> bool:
        return all(torch.equal(first[name], weight) for name, weight in load()[0].state_dict().items())

    assert right() and len(converted) == 1
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 64
    for i, damage in enumerate((b"", whole[:-7], bytes(len(whole)), bytes(flipped)), 2):
        weights.write_bytes(damage)
        assert right() and len(converted) == i, i
        assert weights.read_bytes() == whole
    for i, spoil in enumerate((
        lambda: (copy / "sha256.json").unlink(), lambda: (copy / "tokenizer.json").unlink(),
        lambda: (copy / "adapter_config.json").write_text("{}"), lambda: (copy / "sha256.json").write_text("[" * 9**5),
    ), 6):  # fmt: skip
        spoil()
        assert right() and len(converted) == i, i
    assert right() and len(converted) == 9
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [copy.name]


def test_damaged_models_are_named(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "a")
    save_letters(tmp_path / "a")
    assert load(tmp_path / "a")[0].config.num_hidden_layers == 4
    weights = tmp_path / "a" / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (b"", whole[:5], whole[: len(whole) // 2], b"\xff" * 100):
        weights.write_bytes(damage)
        raises_naming(ValueError, str(tmp_path / "a"), "cannot be loaded")(lambda: load(tmp_path / "a"))
    path = tmp_path / "b.gguf"
    for damage in (b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"no model" * 20):
        path.write_bytes(damage)
        raises_naming(ValueError, str(path), ".gguf")(lambda: load(path))
