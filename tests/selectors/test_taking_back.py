"""AttentionSums that are taken back: after any chunks, drafts and crops they are those of the columns that are left."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import ExactAttend, HashAttention, HeavyHitters, ObservationWindow, Recent, Sink
from hashattn.core import attention_sums
from hashattn.selectors import heavy_hitters
from tests.structured import qkv, seeds

ROOM, DENSE, SEARCH = 72, "dense", "search"
SELECTORS = {
    "heavy hitters": HeavyHitters(k=9),
    "shares": Sink(2) | HeavyHitters(share=0.3),
    "window": ObservationWindow(k=14, window=6, pool=3),
    "joined": Sink(1) | Recent(2) | ObservationWindow(share=0.4, window=6, pool=3),
}
walks = st.lists(
    st.one_of(
        st.tuples(st.just(DENSE), st.integers(2, 20)),
        st.tuples(st.just(SEARCH), st.integers(1, 8)),
        st.tuples(st.just("crop"), st.integers(1, 25)),
    ),
    min_size=3, max_size=9,
)  # fmt: skip


def composed(selector, engine="reference"):
    return HashAttention(selector=selector, attend=ExactAttend(), engine=engine)


class Walk:
    """A cache, and how each of its columns came."""

    def __init__(self, attn, inputs, start):
        self.attn, self.inputs, self.start = attn, inputs, start
        self.cache, self.came, self.furthest = attn.new_cache(2, 2, 16), [], 0

    def add(self, how, count):
        first, last = len(self.came), min(ROOM, len(self.came) + count)
        if last - first < (2 if how == DENSE else 1):
            return None
        q, k, v = (x[:, :, first:last] for x in self.inputs)
        self.cache.append(k, v)
        if first == 0 or self.cache.start.tolist() != self.start.tolist():
            self.cache.set_start(self.start.clamp(max=last))
        self.came += [how] * (last - first)
        self.furthest = max(self.furthest, last)
        if how == DENSE:
            self.attn.accumulate(q, self.cache)
            return None
        return self.attn.run(q, self.cache)[0].out

    def crop(self, count):
        length = max(0, len(self.came) - count)
        self.cache.crop(length)
        self.came = self.came[:length]


def straight(walk):
    """The same columns without detours: each run of dense ones at once, the others one by one."""
    other, i = Walk(walk.attn, walk.inputs, walk.start), 0
    while i < len(walk.came):
        last = i + 1
        while walk.came[i] == DENSE and last < len(walk.came) and walk.came[last] == DENSE:
            last += 1
        other.add(walk.came[i], last - i)
        i = last
    return other


def gone(cache):
    return cache.attention_sums.of(len(cache), cache.keys) == -torch.inf if len(cache) else None


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("undo", [4, attention_sums.UNDO])
@settings(deadline=None, max_examples=12, derandomize=True)
@given(seed=seeds, steps=walks, padding=st.sampled_from([0, 7]))
def test_detours_leave_nothing(name, undo, seed, steps, padding):
    before, attention_sums.UNDO, heavy_hitters.UNDO = attention_sums.UNDO, undo, undo
    try:
        q, k, v = qkv(seed, 2, tokens=ROOM + 3, keys=ROOM + 3)
        walk = Walk(composed(SELECTORS[name]), (2 * q, k, v), torch.tensor([0, padding]))
        for how, count in steps:
            if how != "crop":
                walk.add(how, count)
                continue
            held = copy.deepcopy(walk.cache.state_dict()) if walk.came else None
            try:
                walk.crop(count)
            except ValueError as error:
                assert "cannot be made" in str(error)
                assert undo < walk.furthest - (len(walk.came) - count)  # the last ones can always be taken back
                for key, x in walk.cache.state_dict().items():
                    assert torch.equal(x, held[key]) if isinstance(x, torch.Tensor) else x == held[key]
        if not any(how == DENSE for how in walk.came) or walk.came.count(DENSE) == 1:
            return
        other = straight(walk)
        if other.came != walk.came:  # a dense column that is left alone is one that was decoded
            return
        found, expected = (x.add(SEARCH, 3) for x in (walk, other))
        if found is not None:
            assert torch.equal(gone(walk.cache), gone(other.cache))
            assert torch.allclose(found, expected, atol=1e-5)
    finally:
        attention_sums.UNDO = heavy_hitters.UNDO = before


@pytest.mark.parametrize("name", ["heavy hitters", "window"])
def test_what_is_no_longer_known_is_refused_and_says_what_to_do(name):
    q, k, v = qkv(0, 1, tokens=700, keys=700)
    attn = composed(SELECTORS[name])
    cache = attn.new_cache(1, 2, 16)
    for first, last in ((0, 80), (80, 690)):
        cache.append(k[:, :, first:last], v[:, :, first:last])
        attn.accumulate(q[:, :, first:last], cache)
    before = cache.state_dict()
    with pytest.raises(ValueError, match=r"length 200 .* should be a call of its own"):
        cache.crop(200)
    for key, x in cache.state_dict().items():
        assert torch.equal(x, before[key]) if isinstance(x, torch.Tensor) else x == before[key]
    cache.crop(690 - attention_sums.UNDO)
    assert len(cache.attention_sums.queries) <= 2 * attention_sums.UNDO + 12  # and does not grow with the prompt
    if name == "heavy hitters":
        cache.crop(80)  # a call began there
    cache.crop(0)
    assert len(cache.attention_sums) == 0
