"""FAISS on a GPU. What can be tested without one is how memory is handed over: a CPU index takes it the same way."""

import sys

import pytest
import torch

from hashattn.lab.bench import faiss_gpu
from hashattn.lab.bench.cases import Case
from hashattn.lab.bench.cuda_inputs import make_layer
from tests.structured import raises_naming


def codes(n, words):
    return torch.randint(-(1 << 63), (1 << 63) - 1, (n, words))


@pytest.mark.parametrize("words", [1, 2, 4])
def test_a_search_writes_what_it_finds_where_it_was_asked_to(words):
    faiss = pytest.importorskip("faiss")
    keys, query = codes(700, words), codes(3, words)
    index = faiss.IndexBinaryFlat(64 * words)
    index.add(keys.view(torch.uint8).numpy())
    distances, ids = faiss_gpu.results(query, 40)
    distances.fill_(-1)
    ids.fill_(-1)
    faiss_gpu.search(faiss, index, query, distances, ids)
    faiss_gpu.check(keys, query, distances, ids)
    for wrong in ((distances + 1, ids), (distances, ids.roll(1, 0)), (distances.roll(1, 0), ids.roll(1, 0))):
        raises_naming(RuntimeError, "FAISS finds other keys")(lambda wrong=wrong: faiss_gpu.check(keys, query, *wrong))


def test_a_faiss_without_gpus_is_left_out_by_name(monkeypatch):
    faiss = pytest.importorskip("faiss")
    monkeypatch.delattr(faiss, "GpuIndexBinaryFlat", raising=False)
    raises_naming(ImportError, "no GPU indexes", "faiss-gpu", faiss.__version__)(lambda: faiss_gpu.faiss_us(None, 5, 1))
    monkeypatch.setitem(sys.modules, "faiss", None)
    raises_naming(ImportError, "hashattn[gpu]")(lambda: faiss_gpu.faiss_us(None, 5, 1))


@pytest.mark.gpu
def test_a_search_on_a_gpu_is_timed_and_checked(monkeypatch):
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "GpuIndexBinaryFlat"):
        pytest.skip("this FAISS has no GPU indexes")
    case = Case(8, 2, 64, "bfloat16", 5000, 200, batch=2)
    layer = make_layer(case, 64, steps=2, clustered=False, seed=0, device=torch.device("cuda"))
    assert faiss_gpu.faiss_us(layer, case.k, 3) > 0
    right = faiss_gpu.search
    monkeypatch.setattr(faiss_gpu, "search", lambda f, i, query, *found: right(f, i, ~query, *found))
    raises_naming(RuntimeError, "FAISS finds other keys")(lambda: faiss_gpu.faiss_us(layer, case.k, 3))
