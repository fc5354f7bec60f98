"""How long a draft is to be, from what was accepted and what it cost."""

import itertools

import pytest
import torch

from hashattn.integrations.attached.clock import HostClock, clock_of
from hashattn.integrations.attached.draft_length import PROBES, DraftLength
from hashattn.integrations.attached.drafts import DraftCounts


def play(length, passes, right, step=1.0, check=lambda n: 10.0, most=5):
    """Pass after pass in which a drafted token is right at these positions; the lengths, and seconds a token."""
    lengths, tokens, seconds = [], 0, 0.0
    for i in range(passes):
        n = length.next(most)
        accepted = next((p for p in range(n) if not right(i, p)), n)
        length.saw(n, [(accepted, accepted < n)], n * step, check(n))
        lengths.append(n)
        tokens, seconds = tokens + accepted + 1, seconds + n * step + check(n)
    return lengths, seconds / tokens


def test_right_drafts_are_as_long_as_may_be_and_wrong_ones_stop():
    lengths, pace = play(DraftLength(5), 100, lambda i, p: True)
    assert lengths[:4] == [5, 5, 0, 0] and set(lengths[4:]) == {5} and pace < 0.3 * 10
    lengths, pace = play(DraftLength(5), 2000, lambda i, p: False)
    assert pace < 1.02 * 10
    probes = [i for i, n in enumerate(lengths) if n and i > 40]
    waits = [b - a for a, b in itertools.pairwise(probes)]
    assert waits == sorted(waits) and waits[-1] == PROBES[1] + 1 and {lengths[i] for i in probes} == {1}


def test_a_text_that_becomes_easy_is_drafted_again():
    length = DraftLength(4)
    before, _ = play(length, 60, lambda i, p: False, most=4)
    after, _ = play(length, 300, lambda i, p: True, most=4)
    assert before[-1] == 0 and set(after[-50:]) == {4}


@pytest.mark.parametrize(
    ("step", "chance", "expected"),
    [(0.1, 0.99, {5}), (9.0, 0.9, {0}), (3.0, 0.75, {1, 2, 3})],
    ids=["cheap and right", "as dear as a plain step", "between"],
)
def test_what_a_draft_costs_counts(step, chance, expected):
    right = [[bool(x) for x in row] for row in torch.rand(400, 5, generator=torch.Generator().manual_seed(0)) < chance]
    lengths, _ = play(DraftLength(5), 400, lambda i, p: right[i][p], step=step)
    late = [n for n in lengths[100:] if n in expected]
    assert len(late) > 0.9 * 300
    again, _ = play(DraftLength(5), 400, lambda i, p: right[i][p], step=step)
    assert again == lengths  # the same observations, the same lengths


def test_checks_whose_cost_grows_with_their_tokens_make_drafts_short():
    lengths, _ = play(DraftLength(5), 200, lambda i, p: p == 0, check=lambda n: 10.0 + 8 * max(0, n - 1))
    assert sorted(lengths)[100] == 1


def test_no_draft_is_longer_than_what_is_left():
    length = DraftLength(5)
    assert [length.next(most) for most in (0, 2, 9)] == [0, 2, 5]


def test_first_times_are_left_out():
    length = DraftLength(2)
    length.saw(2, [(2, False)], 1e3, 1e3)  # kernels were loaded
    for _ in range(2):
        length.saw(2, [(2, False)], 2.0, 10.0)
        length.saw(0, [(0, False)], 0.0, 10.0)
    assert length.next(2) == 2


def test_counts_say_what_they_are_of():
    counts = DraftCounts()
    assert counts.use().fidelity is None and "0 tokens in 0 checks" in str(counts.use())
    counts.saw(2, [3, 2], 0.5, 1.0)
    counts.saw(0, [1, 1], 0.0, 1.0)
    counts.look(0, 2, 2)
    counts.look(1, 2, 1)
    use = counts.use()
    assert (use.passes, use.plain, use.tokens, use.acceptance, use.fidelity) == (1, 1, 7, (1.0, 0.5), 0.75)
    assert use.tokens_a_pass == 7 / 4 and (use.drafting, use.checking) == (0.5, 2.0)
    assert "search alone would have chosen another token than full attention at 25.0%" in str(use)


def test_the_hosts_clock():
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock) and clock.seconds(clock.mark(), clock.mark()) >= 0
