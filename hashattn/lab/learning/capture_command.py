"""`hashattn capture`: its arguments, and what it says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hashattn.core.errors import refusals
from hashattn.lab.commands import Help, add_device, check_folder, device_of
from hashattn.lab.learning.manifest import DTYPES, check_free
from hashattn.lab.learning.plan import Plan


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's subparsers."""
    default = Plan()
    capture: argparse.ArgumentParser = commands.add_parser(
        "capture", help="write a model's queries and keys to files, to fit encoders to",
        description="Runs a model densely over texts and writes the queries and keys of its attention layers, after "
        "RoPE, to DIR/SEQUENCE/layer-NN.safetensors. The same command resumes what was stopped.",
        formatter_class=Help,
    )  # fmt: skip
    capture.add_argument(
        "--model", metavar="ID|DIR|GGUF",
        help="hub id, folder, GGUF file or gemma-3-270m; SmolLM2-135M-Instruct if left out",
    )  # fmt: skip
    capture.add_argument("--out", metavar="DIR", required=True, help="new or empty folder, or one to resume")
    capture.add_argument("--text", metavar="FILE", nargs="+", help="texts, which take turns; Shakespeare if left out")
    for name, place, meaning in (("from", 0, "begin"), ("to", 1, "end")):
        capture.add_argument(
            f"--{name}", type=float, default=default.share[place], metavar="X", dest=meaning,
            help=f"where in each text to {meaning}, 0 its start and 1 its end",
        )  # fmt: skip
    for name, meaning in {
        "tokens": "tokens of a sequence, before it is continued", "sequences": "sequences of text",
        "retrieval": "generated prompts with something to be found in the text: needle, multikey, copy in turn",
        "decode": "tokens that the model writes after each sequence",
    }.items():  # fmt: skip
        capture.add_argument(f"--{name}", type=int, default=getattr(default, name), metavar="N", help=meaning)
    capture.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="X", help="of these; 0 takes the likeliest"
    )
    capture.add_argument(
        "--queries", type=_queries, default=default.queries, metavar="N|all",
        help="queries of a sequence that are kept: questions and decoded tokens, the rest drawn",
    )  # fmt: skip
    capture.add_argument("--layers", type=int, nargs="+", metavar="I", help="layers; all of full attention if left out")
    capture.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of the files")
    add_device(capture)
    capture.add_argument(
        "--seed", type=int, default=default.seed, metavar="N", help="of places, prompts, continuations, queries"
    )
    capture.set_defaults(run=run, stopped=stopped)
    return capture


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, load the model, capture; returns the exit status."""
    with refusals():
        plan = Plan(
            tokens=arguments.tokens, sequences=arguments.sequences, retrieval=arguments.retrieval,
            decode=arguments.decode, temperature=arguments.temperature, queries=arguments.queries,
            layers=None if arguments.layers is None else tuple(arguments.layers), dtype=arguments.dtype,
            share=(arguments.begin, arguments.end), seed=arguments.seed,
        )  # fmt: skip
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
