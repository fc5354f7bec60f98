import subprocess
import sys

import pytest

from hashattn.core.extras import require
from tests.structured import raises_naming

OPTIONAL = ["accelerate", "faiss", "gguf", "matplotlib", "safetensors", "scipy", "tqdm", "transformers", "triton"]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_hashattn_imports_no_optional_dependency():
    # torch itself may bring some of them in: what counts is what hashattn adds
    code = f"import sys, torch, numpy; before = set(sys.modules); import hashattn; new = set(sys.modules) - before; \
print(sorted(m for m in {OPTIONAL} if m in new))"
    assert run(code).strip() == "[]"


def test_importing_hashattn_changes_nothing_and_says_nothing():
    code = "import torch; r = torch.get_rng_state(); d = torch.get_default_dtype(), torch.is_grad_enabled(); \
import hashattn; assert torch.equal(r, torch.get_rng_state()); \
assert d == (torch.get_default_dtype(), torch.is_grad_enabled())"
    assert run(code) == ""


def test_it_works_where_no_optional_dependency_is_installed():
    code = f"""
import sys
sys.modules.update(dict.fromkeys(m for m in {OPTIONAL} if m not in ("triton", "tqdm")))
import torch, hashattn
hashattn.ops.hamming.cpu._DISTRIBUTIONS = ()  # what is installed here
q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 300, 8)
for engine in ("reference", "cpu"):
    attn = hashattn.HashAttention.from_preset("simhash_topk", engine=engine)
    print(tuple(attn(q, k, k).shape))
"""
    assert run(code) == "(1, 2, 1, 8)\n(1, 2, 1, 8)\n"


@pytest.mark.parametrize(("module", "extra"), [("tqdm", "fit"), ("scipy.linalg", "fit"), ("transformers", "hf")])
def test_a_missing_extra_names_the_command_that_installs_it(monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    raises_naming(ImportError, "the feature", module.split(".")[0], f'pip install "hashattn[{extra}]"')(
        lambda: require(module, extra, "the feature")
    )


def test_public_names_are_all_there():
    import hashattn

    assert [n for n in hashattn.__all__ if not hasattr(hashattn, n)] == []
    assert sorted(hashattn.__all__, key=str.lower) == sorted(set(hashattn.__all__), key=str.lower)
