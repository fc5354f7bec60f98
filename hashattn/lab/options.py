"""How the commands begin, and the options that several of them take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16")
PRESET = "NAME[:OPTION=X,...]"
_PRESETS = "with options, such as simhash_topk:query_bits=4; hashattn presets lists the names"


class Help(argparse.HelpFormatter):
    """Tells defaults, where there are some: an option whose default is None or False says itself what it leaves."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == argparse.SUPPRESS or action.nargs == 0:
            return action.help
        return f"{action.help} (default: {_shown(action.default)})"


def begin(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    """Add a command to argparse's subparsers; `run` returns the exit status."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=Help
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run, prog=command.prog)
    return command


def takes_long(command: argparse.ArgumentParser, stopped: Callable[[argparse.Namespace], str] | str) -> None:
    """Add --quiet to a command that shows what it is doing.

    Args:
        stopped: what a run that was stopped leaves, and how to go on.
    """
    quiet = "show no progress on standard error; where that is no terminal, no bar is shown anyway"
    command.add_argument("--quiet", action="store_true", help=quiet)
    command.set_defaults(stopped=(lambda _: stopped) if isinstance(stopped, str) else stopped)


def add_words(command: Any, named: Mapping[str, tuple[str, str]], **more: Any) -> None:
    """Add an option for each name -> (metavar, help); None where it is left out. more: what all of them have."""
    for name, (metavar, meaning) in named.items():
        command.add_argument(_dashed(name), metavar=metavar, help=meaning, **more)


def add_numbers(command: Any, kind: type, meanings: Mapping[str, str], defaults: object = None, **more: Any) -> None:
    """Add an option for each name -> help, of numbers of a kind; defaults are attributes of `defaults`, or None."""
    for name, meaning in meanings.items():
        default = None if defaults is None else getattr(defaults, name)
        metavar = "N" if kind is int else "X"
        command.add_argument(_dashed(name), type=kind, default=default, metavar=metavar, help=meaning, **more)


def add_model(command: Any) -> None:
    """Add --model, as :func:`hashattn.lab.workload.model.load` takes it."""
    meaning = "hub id, folder, GGUF file or gemma-3-270m; SmolLM2-135M-Instruct if left out"
    command.add_argument("--model", metavar="ID|DIR|GGUF", help=meaning)


def add_presets(command: Any, *names: str, default: str | list[str], **more: Any) -> None:
    """Add the presets that are asked for, under these names."""
    command.add_argument(*names, default=default, metavar=PRESET, help=_PRESETS, **more)


def add_choices(command: Any, budgets: list[float] | None) -> None:
    """Add what presets are tried with: budgets, dense layers, fitted encoders."""
    own = "shares of the keys; own is each preset's own" + (", which is taken if left out" if budgets is None else "")
    dense = "layers of a model that attend densely: the preset's own, none, or these"
    command.add_argument("--budget", type=share_or_own, nargs="+", default=budgets, metavar="X|own", help=own)
    command.add_argument("--dense-layers", nargs="+", default=["preset"], metavar="preset|none|0,1,-1", help=dense)
    command.add_argument("--encoder", metavar="DIR|NAME", help="fitted encoders, for the presets that take some")


def add_share(command: Any, first: float, last: float) -> None:
    """Add --from and --to, the share of a text, as `begin` and `end`."""
    for name, place, end in (("--from", first, "begin"), ("--to", last, "end")):
        meaning = f"where in each text to {end}, 0 its start and 1 its end"
        command.add_argument(name, type=float, default=place, metavar="X", dest=end, help=meaning)


def add_device(command: Any) -> None:
    """Add --device; device_of() takes it."""
    meaning = "where to compute; cuda if torch sees a GPU, else cpu, if left out"
    command.add_argument("--device", metavar="cpu|cuda|cuda:N", help=meaning)


def from_options(kind: type[T], arguments: argparse.Namespace, **other: Any) -> T:
    """A dataclass whose fields are options of the same names, lists as tuples; `other`: the fields that are none."""
    names = [field.name for field in fields(kind) if field.name not in other]  # type: ignore[arg-type]
    given = {name: getattr(arguments, name) for name in names}
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}, **other)


def share_or_own(text: str) -> float | None:
    """A budget as the commands take it: a share of the keys, or None for "own", the preset's own."""
    try:
        budget = None if text == "own" else float(text)
    except ValueError:
        budget = 0.0
    if budget is not None and not 0 < budget <= 1:
        raise argparse.ArgumentTypeError(f"takes a share above 0 and at most 1, such as 0.05, or own; got {text!r}")
    return budget


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(default: Any) -> str:
    return " ".join(map(_shown, default)) if isinstance(default, list | tuple) else str(default)
