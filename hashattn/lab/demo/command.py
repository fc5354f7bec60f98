"""`hashattn demo`: its arguments, and what it says."""

from __future__ import annotations

import argparse
from typing import Any

from hashattn.core.errors import UserError, refusals
from hashattn.lab.checks import check_file, check_picture, device_of
from hashattn.lab.options import add_device, add_model, add_numbers, add_presets, add_words, begin, takes_long
from hashattn.lab.report import environment, for_people, write_json


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    command = begin(
        commands,
        "demo",
        run,
        "find a fact in a long text with full attention and with a preset",
        "A fact is placed in a long text and asked for, with full attention and with a preset.",
    )
    left = "nothing was written; the same command begins anew, and a shorter --context takes less time"
    takes_long(command, left)
    add_model(command)
    add_presets(command, "--preset", default="dashkv_fast")
    own = "your own about the text, in which no fact is placed then; about that fact if left out"
    fitted = "fitted encoders; those that come with the library for its own model if left out, none for unfitted ones"
    named = {"text": ("FILE", "the long text, in UTF-8; Shakespeare if left out"), "question": ("QUESTION", own)}
    add_words(command, named | {"encoder": ("DIR|NAME|none", fitted)})
    add_numbers(command, int, {"context": "length of the prompt in tokens; about 8000 if left out"})
    add_numbers(command, float, {"budget": "share of the keys to read; the preset's own if left out"})
    add_device(command)
    json = "write all figures to this file, - for standard output"
    add_words(
        command, {"json": ("FILE", json), "plot": ("FILE.png", "write the picture of the keys read to this file")}
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, run, write and print; returns the exit status."""
    with refusals():
        check_file("json", arguments.json, stdout=True)
        check_picture("plot", arguments.plot)
        if arguments.context is not None and arguments.context < 1:
            raise UserError(f"--context must be at least 1 token, got {arguments.context}")
        if arguments.question is not None and not arguments.question.strip():
            raise UserError("--question is empty: ask something, or leave it out for the fact that is placed")
        device = device_of(arguments.device)

        from hashattn.lab.demo.picture import picture, save_plot, verdict
        from hashattn.lab.demo.run import run_demo
        from hashattn.lab.demo.show import NOTE, table

    names = ("model", "preset", "text", "question", "context", "budget", "encoder")
    given = {name: getattr(arguments, name) for name in names}
    result = run_demo(**given, device=str(device), progress=not arguments.quiet)
    try:
        if arguments.json:
            write_json(arguments.json, environment(arguments.command_line, device.type) | result.as_json())
        if arguments.plot:
            save_plot(result.reads, result.preset, arguments.plot)
    finally:  # what was measured is shown, whether or not it could be written
        say = for_people(arguments.json)
        say(f"\n{result.tokens:,} tokens were read in {result.prefill_seconds:.0f} s (densely, once for all).")
        say(f"Question: {result.question}\n")
        say(table(result))
        say(f"\n{NOTE}\n")
        say(f"The answers of full attention and {result.preset} {'agree' if result.agree else 'differ'}.")
        if found := verdict(result.reads):
            say(found)
        say(f"\n{result.layers}")
        for note in result.notes:
            say(f"note: {note}")
        say(f"\n{picture(result.reads, result.preset)}")
    return 0
