"""Every causal text model type of the installed transformers: served, or refused with one of a few reasons."""

import re
from importlib.metadata import version

import pytest
from huggingface_hub.errors import StrictDataclassError

from benchmarks.supported_models import PAGE, row
from tests.integrations.tiny import KINDS, UNTRIED, build, outcome, write

LINES = PAGE.read_text().splitlines()
MADE_WITH = next(line.split()[0] for line in LINES if "`python -m benchmarks.supported_models`" in line)
INSTALLED = version("transformers") == MADE_WITH  # others have other types, and other reasons to refuse one
REASONS = [
    "it has no attention that calls the attention interface of transformers and has a cache layer of its own",
    "it has no layer of full causal attention: (sliding|bidirectional|indexed|qwen sparse) attention",
    "it uses multi-head latent attention, whose cache holds no keys",
    "it has a sparse attention of its own, whose choice the attention function is given",
    "its attention has learned sinks, which take part in every softmax",
    "its attention logits are soft-capped",
    "its attention adds a position bias to the logits",
    r"its attention calls the attention function \d times a layer",
    "its attention attends to other keys and values than its cache holds: to what it makes of them",
    "its attention makes a mask of its own",
    "its layers keep several caches each, or one under another layer's number",
    "it has several stacks of attention whose layers share their numbers",
    "some of its layers share the keys of other layers",
    "the attention mask (hides keys in the middle of a row|is torch.bool)",  # what some make of left padding
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNTRIED])
def test_it_is_served_or_refused_with_a_reason(kind):
    found = outcome(kind)
    if found.refused:
        assert any(re.search(reason, found.refused) for reason in REASONS), found.refused
    else:
        assert found.searched
    if INSTALLED:
        assert row(found) in LINES, "make docs/supported_models.md anew: see its first lines"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNTRIED)
def test_what_is_not_tried_cannot_be(kind):
    with pytest.raises((ImportError, IndexError, RuntimeError, ValueError, StrictDataclassError)):
        write(build(kind), 1)


def test_the_page_names_every_type_once():
    named = [line.split("`")[1] for line in LINES if line.startswith("| `")]
    assert named == (KINDS if INSTALLED else sorted(set(named)))


def test_the_page_is_made_with_the_version_that_is_tested():
    assert f"transformers=={MADE_WITH}" in (PAGE.parents[1] / "constraints.txt").read_text().splitlines()
