"""Which model types of transformers are served: docs/supported_models.md, made from what attaching to each one does.

Run from the repository's root: `python -m benchmarks.supported_models`.
"""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version
from pathlib import Path

from tests.integrations.tiny import KINDS, UNTRIED, Outcome, outcome

PAGE = Path(__file__).parents[1] / "docs" / "supported_models.md"
TEXT = """# Supported models

What became of attaching to a tiny, randomly initialised model of every causal text model type of transformers
{version} (`python -m benchmarks.supported_models`; `tests/integrations/test_every_model.py` checks each line).
Served means: with a budget of everything and the search forced, greedy decoding, left-padded rows and a static
cache (where the model takes one) write the tokens that the model writes alone. {served} types are served,
{refused} are refused, and {unbuilt} could not be tried.

A type's default config decides: Mistral with a sliding window in every layer is refused, the same model without is
served. Layers with a sliding window, or without attention, run as the model has them.

| type | class | attached |
|---|---|---|
"""


def row(found: Outcome) -> str:
    """The line of a type."""
    if found.refused:
        return f"| `{found.kind}` | {found.name} | refused: {reason(found.refused)} |"
    which = "all" if len(found.searched) == found.layers else "those of full"
    return f"| `{found.kind}` | {found.name} | served, {which} attention layers search |"


def reason(message: str) -> str:
    """What is said of the model itself."""
    short = message.split(" cannot be attached: ")[-1].removeprefix("this call cannot be served: ")
    return re.sub(r"\s*\(attach with strict=False.*", "", short).replace("|", "\\|")


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    lines = {}
    found = [outcome(kind) for kind in KINDS if kind not in UNTRIED]
    lines |= {one.kind: row(one) for one in found}
    lines |= {kind: f"| `{kind}` | | not tried: {why} |" for kind, why in UNTRIED.items()}
    served = sum(not one.refused for one in found)
    head = TEXT.format(
        version=version("transformers"), served=served, refused=len(found) - served, unbuilt=len(UNTRIED)
    )
    PAGE.write_text(head + "\n".join(lines[kind] for kind in KINDS) + "\n")


if __name__ == "__main__":
    main()
