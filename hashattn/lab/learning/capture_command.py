"""`hashattn capture`: its arguments, and what it says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hashattn.core.errors import refusals
from hashattn.lab.checks import check_folder, device_of
from hashattn.lab.learning.manifest import DTYPES, check_free
from hashattn.lab.learning.plan import Plan
from hashattn.lab.options import (
    add_device,
    add_model,
    add_numbers,
    add_share,
    add_words,
    begin,
    from_options,
    takes_long,
)


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    default = Plan()
    command = begin(
        commands,
        "capture",
        run,
        "write a model's queries and keys to files, to fit encoders to",
        "Runs a model densely over texts and writes the queries and keys of its attention layers, after "
        "RoPE, to DIR/SEQUENCE/layer-NN.safetensors. The same command resumes what was stopped.",
    )
    takes_long(command, stopped)
    add_model(command)
    add_words(command, {"out": ("DIR", "new or empty folder, or one to resume")}, required=True)
    add_words(command, {"text": ("FILE", "texts, which take turns; Shakespeare if left out")}, nargs="+")
    add_share(command, *default.share)
    numbers = {
        "tokens": "tokens of a sequence, before it is continued",
        "sequences": "sequences of text",
        "retrieval": "generated prompts with something to be found in the text: needle, multikey, copy in turn",
        "decode": "tokens that the model writes after each sequence",
        "seed": "of places, prompts, continuations, queries",
    }
    add_numbers(command, int, numbers, default)
    add_numbers(command, float, {"temperature": "of what the model writes; 0 takes the likeliest"}, default)
    kept = "queries of a sequence that are kept: questions and decoded tokens, the rest drawn"
    add_words(command, {"queries": ("N|all", kept)}, type=_queries, default=default.queries)
    add_numbers(command, int, {"layers": "layers; all of full attention if left out"}, nargs="+")
    command.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of the files")
    add_device(command)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, load the model, capture; returns the exit status."""
    with refusals():
        plan = from_options(Plan, arguments, share=(arguments.begin, arguments.end))
        check_free(arguments.out)
        check_folder("out", arguments.out)
        device = device_of(arguments.device)

        from hashattn.lab.learning.capture import capture
        from hashattn.lab.workload.model import check_source, load, name_of
        from hashattn.lab.workload.texts import read_text

        check_source(arguments.model)
        texts = [read_text(path) for path in arguments.text or [None]]
        model, tokenizer = load(arguments.model, device=device)
    shards = capture(
        model, tokenizer, texts, arguments.out, plan, name=name_of(arguments.model), progress=not arguments.quiet
    )
    size = sum(path.stat().st_size for path in shards.folder.rglob("*.safetensors"))
    print(f"{shards}, {size / 1e6:,.0f} MB")
    return 0


def stopped(arguments: argparse.Namespace) -> str:
    """What a stopped capture leaves, and how to go on."""
    from hashattn.lab.learning import manifest
    from hashattn.lab.learning.shards import Shards

    try:
        shards = Shards(Path(arguments.out), manifest.read(arguments.out))
    except ValueError:
        return "nothing was written yet; the same command begins anew"
    whole = sum(shards.fault(sequence) is None for sequence in shards.sequences)
    return (
        f"{whole} of {len(shards.sequences)} sequences are whole in {arguments.out} and are kept; the same command "
        "goes on with the others"
    )


def _queries(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number of queries, or all; got {text!r}") from None
