"""On a GPU: CUDA C++ passes its probe, and damaged kernels in the cache are compiled again. Run with pytest -m gpu."""

import pytest
import torch

from hashattn import FlatHamming, HashAttention, SimHash, TopK
from hashattn.ops.decode.cuda import OLDEST, InCuda, compiler
from tests.structured import qkv

pytestmark = pytest.mark.gpu


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache folder that is empty, and nothing loaded."""
    if torch.cuda.get_device_capability() < OLDEST:
        pytest.skip("CUDA C++ does not serve this GPU")
    pytest.importorskip("cuda.bindings")
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path))
    for function in (compiler.why_not_on, compiler.kernel):
        function.cache_clear()
    yield tmp_path / "kernels"
    for function in (compiler.why_not_on, compiler.kernel):
        function.cache_clear()


def test_the_probe_lets_it_run_and_explain_says_so(fresh):
    assert compiler.why_not_on(torch.cuda.current_device()) is None
    assert InCuda().why_not_on(torch.device("cuda")) == []
    attn = HashAttention(SimHash(64), FlatHamming(), TopK(k=64), engine="gpu")
    assert "CUDA C++" in str(attn.explain(q_heads=8, kv_heads=2, head_dim=64, keys=4096, device="cuda"))


def test_damaged_kernels_are_compiled_again(fresh):
    attn = HashAttention(SimHash(64), FlatHamming(), TopK(k=64), engine="gpu")
    q, k, v = (x.cuda().bfloat16() for x in qkv(0, keys=600, dim=64))
    first = attn(q, k, v)
    paths = [*fresh.iterdir()]
    assert paths
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])
    compiler.kernel.cache_clear()
    assert torch.equal(attn(q, k, v), first)
    assert {p.name for p in fresh.iterdir()} == {p.name for p in paths}
    assert all(compiler.kept(fresh, p.name.rpartition("-")[0], ".cubin") == p for p in paths)
