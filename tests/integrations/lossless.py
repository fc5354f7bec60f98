"""What tests of checked drafts share: presets, clocks that say what pays, and texts to compare."""

from __future__ import annotations

import pytest
import torch

from hashattn import Centring, HashAttention, SimHash
from hashattn.integrations.transformers import HashedLayer
from hashattn.integrations.transformers.lossless import decoding
from tests.integrations.models import CACHE, prompt, write

FORCED = {"sinks": 2, "recent": 6, "dense_layers": (0,)}
PRESETS = {
    "dashkv": {"t1": 0.05, "t2": 0.15, **FORCED},
    "dashkv_fast": {"share": 0.12, **FORCED},
    "simhash_topk": {"share": 0.12, **FORCED},
    "h2o": {"share": 0.15},
    "snapkv": {"k": 12, "window": 8},
    "streaming": {"sinks": 2, "recent": 8},
}


class Clock:
    """Drafted steps take so long, and checks, whatever happens."""

    def __init__(self, drafting: float, checking: float) -> None:
        self.times, self.marks = (drafting, checking), 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def seconds(self, first: int, last: int) -> float:
        return self.times[(first - 1) % 3]


def clock(monkeypatch, drafting=1e-4, checking=1.0):
    """Let drafts cost so little that as many tokens are drafted as may be, or what is given."""
    monkeypatch.setattr(decoding, "clock_of", lambda device: Clock(drafting, checking))


@pytest.fixture
def cheap_drafts(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other longer than such small operators take
    clock(monkeypatch)
    yield
    torch.set_num_threads(threads)


def preset(name: str, **options) -> HashAttention:
    attn = HashAttention.from_preset(name, **PRESETS[name], engine="reference", **options)
    if attn.encoder is None:
        return attn
    planes = 2 if name == "dashkv_fast" else 1
    return attn.replace(encoder=SimHash(128, query_bits=planes, centring=Centring(keys=16)))  # which short texts have


def both(model, attn, run, draft=5, **options):
    """What run() gives unattached and with checked drafts, from the same seed; and the report."""
    torch.manual_seed(7)
    expected = run()
    with attn.attach(model, check="dense", draft=draft, **options) as handle:
        torch.manual_seed(7)
        return expected, run(), handle.report()


def text(model, rows=3, padding=(0, 9, 4), seed=0, **options):
    """What a model writes, with all that generate() returns."""
    given = {"max_new_tokens": 24, "pad_token_id": 0, "return_dict_in_generate": True, **options}
    return write(model, prompt(rows, padding, seed=seed), **given)


def same_cache(found, expected):
    """Two caches that hold the same keys and values, to rounding; the first is hashed."""
    assert found.get_seq_length() == expected.get_seq_length()
    assert any(isinstance(layer, HashedLayer) for layer in found.layers)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-4) and torch.allclose(one.values, other.values, atol=1e-4)


def cache(output):
    return output[CACHE]
