"""`hashattn presets`: all presets in a table."""

from __future__ import annotations

import argparse
from typing import Any

from hashattn.core.errors import refusals
from hashattn.lab.checks import STDOUT, check_file
from hashattn.lab.options import add_words, begin
from hashattn.lab.report import write_json
from hashattn.presets.listing import listing, table


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    command = begin(
        commands,
        "presets",
        run,
        "a table of all presets",
        "All presets: paper, what must be fitted first (hashattn fit --preset), whether they take a share "
        "of the keys (--budget), and which engines serve a decode step on this machine. hashattn explain NAME says "
        "more of one.",
    )
    meaning = "the same with all options for programs, to this file; standard output if none is named"
    add_words(command, {"json": ("FILE", meaning)}, nargs="?", const=STDOUT)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or write it; returns the exit status."""
    with refusals():
        check_file("json", arguments.json, stdout=True)
    lines = listing()
    if arguments.json is None:
        print(table(lines))
    else:
        write_json(arguments.json, [line.as_json() for line in lines])
    return 0
