"""Progress bars: on standard error, and only where that is a terminal."""

from __future__ import annotations

import sys
from typing import Any

from hashattn.core.extras import require


def bar(extra: str, what: str, *arguments: Any, shown: bool = True, **options: Any) -> Any:
    """tqdm's bar with these arguments and options, to iterate over or to update.

    Args:
        extra: that installs tqdm.
        what: needs it, for the message.
        shown: False shows none anywhere.

    Raises:
        ImportError: tqdm is missing.
    """
    made = require("tqdm", extra, what).tqdm
    return made(*arguments, file=sys.stderr, disable=None if shown else True, **options)
