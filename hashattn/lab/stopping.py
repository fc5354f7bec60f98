"""SIGTERM as an exception, as Ctrl-C is one, so that a command can say what it leaves behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Like KeyboardInterrupt, it is no Exception: nobody takes it for an error of the work."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within this block SIGTERM raises Terminated; a second one ends the process at once, as if there were no block."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
