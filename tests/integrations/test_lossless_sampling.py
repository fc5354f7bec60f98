"""Checked drafts that sample: the distribution is full attention's, and so is every draw of the same seed."""

import pytest
import torch
from scipy import stats

from hashattn.integrations.transformers.lossless.draft import Draft
from tests.integrations.lossless import cheap_drafts
from tests.integrations.models import TENTH, make

__all__ = ["cheap_drafts"]
pytestmark = pytest.mark.usefixtures("cheap_drafts")
DRAWS, PER_CALL, LENGTH = 20_000, 2_000, 40


@pytest.fixture(scope="module")
def model():
    return make(num_hidden_layers=2, vocab_size=12, eos_token_id=None, initializer_range=0.06)


def third_tokens(model, ids):
    """How often each first and third token were written, and how likely full attention says that they are."""
    options = {"max_new_tokens": 3, "do_sample": True, "temperature": 1.3, "top_k": 0, "pad_token_id": 0}
    counts = torch.zeros(12, 12)
    for call in range(DRAWS // PER_CALL):
        torch.manual_seed(call)
        written = model.generate(ids.expand(PER_CALL, -1), attention_mask=torch.ones(PER_CALL, LENGTH), **options)
        for first, third in written[:, [LENGTH, LENGTH + 2]].tolist():
            counts[first, third] += 1
    with torch.no_grad():
        chances = torch.zeros(12, 12)
        start = (model(ids).logits[0, -1] / 1.3).softmax(-1)
        for first in range(12):
            longer = torch.cat([ids, torch.tensor([[first]])], 1)
            second = (model(longer).logits[0, -1] / 1.3).softmax(-1)
            after = torch.cat([longer.expand(12, -1), torch.arange(12)[:, None]], 1)
            third = (model(after).logits[:, -1] / 1.3).softmax(-1)
            chances[first] = start[first] * (second @ third)
    return counts.flatten(), chances.flatten()


@pytest.mark.parametrize("wrong", [False, True], ids=["drafts", "drafts that are always wrong"])
def test_the_distribution_is_full_attentions(model, monkeypatch, wrong):
    if wrong:
        guess = Draft._guess
        monkeypatch.setattr(Draft, "_guess", lambda *given: (guess(*given) + 1) % 12)
    ids = torch.randint(1, 12, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with TENTH.attach(model, check="dense", draft=2) as handle:
        counts, chances = third_tokens(model, ids)
        use = handle.report().drafts
    assert use.passes >= DRAWS // PER_CALL and (0 < use.fidelity < 1)
    expected = chances / chances.sum() * DRAWS
    kept = expected >= 5
    assert kept.sum() > 60
    found, wanted = (torch.cat([x[kept], x[~kept].sum()[None] + 1]).double() for x in (counts, expected))
    assert stats.chisquare(found.numpy(), (wanted * found.sum() / wanted.sum()).numpy()).pvalue > 0.001
