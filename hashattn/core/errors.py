"""How commands end that cannot do as asked: what the user can put right, told from the library's own faults."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Input that cannot be used. The message says what is wrong and what would work: no traceback is needed."""


class Failure(RuntimeError):
    """Work that could not be finished, for a reason that the message tells: no traceback is needed either."""


REFUSALS = (ValueError, TypeError, ImportError, OSError, RuntimeError)


@contextlib.contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Within this block, which checks what was given and does no work yet, these errors are the user's to put right.

    They become UserErrors of the same words. What is raised outside of such blocks is a fault of the library, unless
    it is one of the two classes above: commands then show a traceback.

    Args:
        kinds: REFUSALS by default.
    """
    try:
        yield
    except (UserError, Failure):
        raise
    except Exception as error:
        if not isinstance(error, kinds or REFUSALS):
            raise
        raise UserError(reason(error)) from error


def reason(error: BaseException) -> str:
    """The words of an error, without the number that the system has for it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error).strip() or type(error).__name__
