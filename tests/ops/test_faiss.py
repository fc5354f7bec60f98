"""The wrapper around FAISS's scan, and a FAISS that cannot be used."""

import importlib
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops.hamming import cpu
from tests.structured import raises_naming, seeds


def arrays(seed, queries=3, keys=50, size=16):
    g = np.random.default_rng(seed)
    make = lambda *shape: g.integers(0, 256, shape, dtype=np.uint8)  # noqa: E731
    return make(2, queries, size), make(2, keys, size), np.full((2, queries, keys), -7, np.int32)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 9), st.integers(0, 300), st.sampled_from([8, 16, 24, 32, 64, 128]))
def test_faiss_counts_what_numpy_counts(seed, queries, keys, size):
    assert cpu.faiss() is not None
    query, codes, out = arrays(seed, queries, keys, size)
    cpu.hammings(query, codes, out)
    expected = (np.unpackbits(query, axis=-1)[:, :, None] != np.unpackbits(codes, axis=-1)[:, None]).sum(-1)
    assert np.array_equal(out, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "faiss", lambda: None)
        cpu.hammings(query, codes, other := np.full_like(out, -7))
    assert np.array_equal(other, expected)


def test_arrays_that_raw_pointers_would_misread_are_refused():
    query, codes, out = arrays(0)
    for wrong in ((query.astype(np.int64), codes, out), (query, codes, out.astype(np.int64))):
        raises_naming(TypeError, "uint8", "int64")(lambda w=wrong: cpu.hammings(*w))
    for wrong in (
        (query[..., :8], codes, out), (query, codes[:, :-1], out), (query, codes, out[:, :2]), (query[0], codes, out),
        (query[..., :5], codes[..., :5], out), (query[:1], codes, out),
    ):  # fmt: skip
        raises_naming(ValueError, "query [H, Q, bytes]")(lambda w=wrong: cpu.hammings(*w))
    wide = np.zeros((2, 50, 32), np.uint8)[..., :16]
    raises_naming(ValueError, "C-contiguous", "np.ascontiguousarray")(lambda: cpu.hammings(query, wide, out))
    assert (out == -7).all()


@pytest.fixture
def installed(monkeypatch):
    """installed(versions, module): as if these distributions and this module were there."""

    def pretend(versions, module):
        def load(name):
            if isinstance(module, Exception):
                raise module
            return module

        monkeypatch.setattr(cpu, "_version", versions.get)
        monkeypatch.setattr(importlib, "import_module", load)
        cpu.faiss.cache_clear()

    yield pretend
    monkeypatch.undo()
    cpu.faiss.cache_clear()


def test_a_faiss_without_the_scan_names_the_version_that_has_it(installed):
    installed({"faiss-cpu": "1.7.0"}, types.SimpleNamespace(__version__="1.7.0"))
    raises_naming(ImportError, "faiss 1.7.0", "hammings", "faiss-cpu>=1.15.1")(cpu.faiss)


def test_two_distributions_of_faiss_are_refused_and_named(installed):
    installed({"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}, types.SimpleNamespace(hammings=None))
    raises_naming(ImportError, "faiss-cpu 1.15.1", "faiss-gpu 1.15.1", "pip uninstall")(cpu.faiss)


def test_a_faiss_that_cannot_be_imported_is_not_taken_for_none(installed):
    installed({"faiss-gpu": "1.15.1"}, ImportError("libcudart.so.12: no such file"))
    raises_naming(ImportError, "faiss-gpu 1.15.1", "libcudart", "reinstall")(cpu.faiss)


def test_without_faiss_numpy_scans(installed):
    installed({}, ImportError("no faiss"))
    assert cpu.faiss() is None
    query, codes, out = arrays(1)
    cpu.hammings(query, codes, out)
    expected = (np.unpackbits(query, axis=-1)[:, :, None] != np.unpackbits(codes, axis=-1)[:, None]).sum(-1)
    assert np.array_equal(out, expected)
