"""What all tests share: no model hub, a fair share of the cores, one small real model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from tests.interpreter import ranges_take_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Send the tests that use the model to one worker (with --dist loadgroup), so that it is loaded once."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if "smollm2" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group("smollm2"))


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    ranges_take_tensors()


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 on the CPU, and its tokenizer; downloaded by the first test that needs it."""
    from hashattn.lab.workload.model import load

    return load(None)
