"""Loading: the demo's model comes whole, and what cannot be loaded is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from hashattn.workload.model import load, name_of

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
