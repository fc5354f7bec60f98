"""Optional dependencies: imported where they are needed, missed with a message that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: its dotted name.
        extra: the extra of hashattn that installs it.
        what: the feature that needs it, for the message.

    Raises:
        ImportError: it is missing; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f'{what} needs {package}: pip install "hashattn[{extra}]"') from error
