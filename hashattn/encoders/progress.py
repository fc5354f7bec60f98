"""A progress bar while an encoder is fitted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from hashattn.core.progress import bar as progress_bar


@contextlib.contextmanager
def progress_of(steps: int, shown: bool) -> Iterator[Callable[[int, float], None] | None]:
    """What a fit calls with its step and loss, to move a bar; None if none is to be shown.

    Raises:
        ImportError: tqdm is missing.
    """
    if not shown:
        yield None
        return
    with progress_bar("fit", "a progress bar", total=steps, desc="fitting", unit="step") as bar:

        def watch(step: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(step - bar.n)

        yield watch
