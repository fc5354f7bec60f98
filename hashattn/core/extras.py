"""Optional dependencies and other packages' parts: imported where they are needed, missed with a message that helps."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any


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


def loaded(point: EntryPoint) -> Any:
    """What an installed package offers under an entry point.

    Raises:
        ImportError: it cannot be imported, for whatever reason; the package is named.
    """
    try:
        return point.load()
    except Exception as error:  # importing runs the package's code
        package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an installed package"
        raise ImportError(
            f"{package} offers {point.name!r} ({point.value}, in {point.group}), which cannot be imported: "
            f"{type(error).__name__}: {error}. Mend or uninstall that package"
        ) from error
