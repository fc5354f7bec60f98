"""The entry point of the command: beside the package, whose import takes seconds in which Ctrl-C may come."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `hashattn`; see hashattn.cli.main. Stopped while it is being imported, it says so in a line."""
    try:
        from hashattn.cli import main as run  # imports torch
    except KeyboardInterrupt:
        print("hashattn: stopped by Ctrl-C: nothing was done yet", file=sys.stderr)
        return 130
    return run()
