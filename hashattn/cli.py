"""The command line: hashattn demo, presets, explain, capture, fit, eval, bench."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from hashattn.core.errors import Failure, UserError, reason
from hashattn.core.version import __version__
from hashattn.lab import explain_command
from hashattn.lab import presets_command as presets
from hashattn.lab.bench import command as bench
from hashattn.lab.demo import command as demo
from hashattn.lab.evaluation import command as evaluation
from hashattn.lab.learning import capture_command, fit_command
from hashattn.lab.stopping import Terminated, stoppable

FAILED, UNUSABLE, INTERRUPTED, UNREAD, TERMINATED = 1, 2, 130, 141, 143  # as shells have it: 128 and the signal
_ROOM = "it needs more memory than there is: fewer tokens, a smaller model, or --dtype bfloat16 where there is one help"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        the exit status: 0; 2 for input that cannot be used, which is said before any work is done; 1 for work that
        could not be finished; 130, 141 or 143 if Ctrl-C, a reader that went away (`| head`) or SIGTERM stopped it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace(prog="hashattn", debug=False, stopped=_nothing_left)
    try:
        with stoppable(), contextlib.redirect_stdout(Stdout(sys.stdout)):
            try:
                bench.check_spelling(words)
                parser().parse_args(words, arguments)
                arguments.command_line = words
                return int(arguments.run(arguments))
            finally:
                _flush()
    except BrokenPipeError:
        _leave_stdout()
        return UNREAD
    except KeyboardInterrupt as stop:
        named, status = ("SIGTERM", TERMINATED) if isinstance(stop, Terminated) else ("Ctrl-C", INTERRUPTED)
        _say(arguments, f"stopped by {named}: {arguments.stopped(arguments)}")
        return status
    except Exception as error:
        if arguments.debug:
            raise
        status, said = _ended(error)
        if said is not None:
            _say(arguments, said)
            return status
        traceback.print_exc()
        _say(arguments, f"this is a fault of hashattn, not of what it was given; please report it: {_about(words)}")
        return status


def parser() -> argparse.ArgumentParser:
    """The argument parser with all commands."""
    top = argparse.ArgumentParser(
        prog="hashattn",
        description="Attention as search over hashed keys.",
        epilog="hashattn COMMAND --help lists the options of one. Exit status: 0; 2 for what cannot be used;\n"
        "1 for what failed; 130 and 143 if stopped by Ctrl-C and SIGTERM.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=_versions(), help="show versions and exit")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for module in (demo, presets, explain_command, capture_command, fit_command, evaluation, bench):
        module.add(commands)
    return top


def _ended(error: Exception) -> tuple[int, str | None]:
    """(exit status, what to say) of an error; None for a fault of the library, whose traceback is wanted."""
    if isinstance(error, UserError):
        return UNUSABLE, reason(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error):
        return FAILED, f"{_ROOM} ({reason(error).splitlines()[0]})"
    if isinstance(error, Failure):
        return FAILED, reason(error)
    if isinstance(error, OSError) and error.errno is not None:  # the system's: a full disk, a folder that went away
        return FAILED, reason(error)
    return FAILED, None


def _nothing_left(arguments: argparse.Namespace) -> str:
    """Of commands that are done at once; the others say what they leave, and how to go on."""
    return "nothing was written"


def _say(arguments: argparse.Namespace, line: str) -> None:
    print(f"{arguments.prog}: {line}", file=sys.stderr)


class Stdout:
    """Standard output, which says of itself what it cannot take; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failure(f"standard output: {reason(error)}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _flush() -> None:
    """Find out now, not when the interpreter ends, whether standard output took what was printed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _leave_stdout()
        raise Failure(f"standard output: {reason(error)}") from error


def _leave_stdout() -> None:
    """Nobody reads it, or it is full: what is left in its buffer goes nowhere, so that the interpreter ends quietly."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file: of a test, or of a notebook
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _versions() -> str:
    said = [f"hashattn {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("transformers", "triton", "faiss-cpu", "faiss-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            said.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(said)


def _about(words: Sequence[str]) -> str:
    return f"the lines above, the command {shlex.join(['hashattn', *words])!r}, and {_versions()}"


if __name__ == "__main__":
    sys.exit(main())
