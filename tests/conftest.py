"""What all tests share: no model hub, a fair share of the cores, one small real model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from tests.interpreter import ranges_take_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_FILES = {
    "tests/contract/test_recall_on_a_model.py",
    "tests/integrations/test_lossless_smollm2.py",
    "tests/integrations/test_smollm2.py",
    "tests/lab/demo/test_run.py",
    "tests/lab/demo/test_story.py",
    "tests/lab/evaluation/test_smollm2.py",
    "tests/lab/workload/test_model.py",
    "tests/lab/workload/test_retrieval.py",
}

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Send the files that use the model to one worker, so that it is loaded once, and every other test to either.

    Groups by marks (xdist's loadgroup) need node ids that can be written to, which pytest 9.2 has no more.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "model" if nodeid.split("::")[0] in MODEL_FILES else nodeid

    return ByModel(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    ranges_take_tensors()


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 on the CPU, and its tokenizer; downloaded by the first test that needs it."""
    from hashattn.lab.workload.model import load

    return load(None)
