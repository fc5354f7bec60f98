"""Guard: a lock that what holds it can be copied and pickled with. guarded: methods that hold it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Guard:
    """Held by `with`, again and again by the same thread; a copy, and what was unpickled, has one of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Guard], tuple[()]]:
        return Guard, ()


class Guarded(Protocol):
    """What has a guard."""

    guard: Guard


Owner = TypeVar("Owner", bound=Guarded)


def guarded(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
    """A method that holds its object's guard: threads that call it come one after the other."""

    @functools.wraps(method)
    def alone(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.guard:
            return method(self, *args, **kwargs)

    return alone
