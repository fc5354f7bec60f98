"""`hashattn bench`: its arguments, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hashattn.lab.bench.cases import CUDA_KEYS, CUDA_SHAPES, KEYS, SHAPES, Case, parse_keys, parse_shape
from hashattn.lab.commands import Help, check_file, check_picture

PER = ("query_head", "kv_head")
TAKES = {  # what is measured, and its own arguments
    "--device cpu": ("shape", "keys", "rounds", "threads", "auto"),
    "--device cuda": ("shape", "keys", "rounds", "batch", "clustered", "plot"),
    "--device cuda --kinds": ("shape", "keys", "rounds", "batch"),
    "--device cuda --e2e": ("keys", "rounds", "batch", "preset", "no_compile"),
    "--device cuda --crossover": ("shape", "batch"),
    "--recall": (
        "data", "presets", "budget", "tokens", "queries", "layers", "index", "text", "train", "seed", "threads", "plot",
    ),
}  # fmt: skip


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's subparsers. Defaults depend on the device, so that None stands for them."""
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench", help="time a decode step against the fastest dense attention",
        description="One decode step of one layer, checked against the reference first, then timed against the fastest "
        "dense attention in the same run; or, with --e2e, of a whole model. Random keys: cost, not quality, but for "
        "--recall. Without --shape and --keys it takes minutes.",
        formatter_class=Help,
    )  # fmt: skip
    bench.add_argument(
        "--device", choices=("cpu", "cuda"), help="what to measure (default: cpu; cuda for --kinds, --e2e ...)"
    )
    bench.add_argument(
        "--shape", nargs="+", metavar="HQ/HKVxD:DTYPE",
        help=f"query heads/KV heads x head_dim (default: {_listed(SHAPES)}; cuda: {_listed(CUDA_SHAPES)})",
    )  # fmt: skip
    bench.add_argument(
        "--keys", nargs="+", metavar="N:K",
        help=f"keys : keys kept (default: {_listed(f'{n}:{k}' for n, k in KEYS)}; cuda: "
        f"{_listed(f'{n}:{k}' for b, n, k in CUDA_KEYS if b == 1)} at batch 1, "
        f"{_listed(f'{n}:{k}' for b, n, k in CUDA_KEYS if b == 8)} at batch 8)",
    )  # fmt: skip
    bench.add_argument("--bits", type=int, help="of the codes, 8 to 4096 (default: 128; cuda: 64, or 128, 256)")
    bench.add_argument(
        "--per", nargs="+", choices=PER, help="who chooses keys: a group or each head (default: kv_head; cuda: both)"
    )
    bench.add_argument(
        "--rounds", type=int, metavar="R", help="turns, of which medians are taken (default: 9, 11, e2e 5)"
    )
    bench.add_argument(
        "--plot", metavar="FILE.png", help="with --device cuda or --recall: write a picture to this file"
    )
    bench.add_argument("--out", metavar="FILE.json", help="write the results to this file, - for standard output")
    cpu = bench.add_argument_group("with --device cpu")
    cpu.add_argument(
        "--threads",
        nargs="+",
        type=int,
        metavar="T",
        help="threads of torch and the scan, also --recall's (default: 1)",
    )
    cpu.add_argument(
        "--auto", action="store_true",
        help='only compare engine="auto" with dense attention, by default from 128 to 8,192 keys',
    )  # fmt: skip
    cuda = bench.add_argument_group("with --device cuda")
    cuda.add_argument("--batch", nargs="+", type=int, metavar="B", help="sequences (default: 1, with --keys)")
    cuda.add_argument("--clustered", action="store_true", help="all near keys in one sixty-fourth of the tokens")
    mode = cuda.add_mutually_exclusive_group()
    mode.add_argument(
        "--kinds", action="store_true",
        help="what each kind of step costs instead, at 131,072 keys: with sinks and recents, with queries of 2 bit "
        "planes, within a radius, from chunks, in tiers",
    )  # fmt: skip
    mode.add_argument(
        "--e2e", action="store_true",
        help="tokens per second of a Llama-3-8B with random weights instead, at 32,768 and 131,072 keys, and at batch "
        "1 and the largest that fits",
    )  # fmt: skip
    mode.add_argument(
        "--crossover", action="store_true",
        help="from how many keys on a step is faster than dense attention instead, at batch 1 and 8",
    )  # fmt: skip
    _add_recall(bench, mode)
    e2e = bench.add_argument_group("with --e2e")
    e2e.add_argument("--preset", metavar="NAME", help="measure this preset, with its own bits and budget")
    e2e.add_argument("--no-compile", action="store_true", help="leave the model's small operations to PyTorch")
    return bench


def _add_recall(bench: argparse.ArgumentParser, mode: Any) -> None:
    mode.add_argument(
        "--recall", action="store_true",
        help="what all presets keep of attention instead, against bytes a key and against microseconds, on the same "
        "queries and keys; on a CPU",
    )  # fmt: skip
    recall = bench.add_argument_group("with --recall")
    recall.add_argument(
        "--data", nargs="+", metavar="NAME|DIR|GGUF",
        help='"synthetic", or models, of which layers are captured (default: smollm2-135m synthetic)',
    )  # fmt: skip
    recall.add_argument("--presets", nargs="+", metavar="NAME[:OPTION=X,...]", help="which (default: all)")
    recall.add_argument(
        "--budget",
        metavar="X|own",
        help="share of the keys for presets that take one, or each one's own (default: 0.05)",
    )
    recall.add_argument("--tokens", type=int, metavar="N", help="keys (default: 4096)")
    recall.add_argument("--queries", type=int, metavar="T", help="of the last positions, decoded (default: 32)")
    recall.add_argument("--layers", type=int, nargs="+", metavar="I", help="of a model (default: five of them)")
    recall.add_argument(
        "--index", metavar="CALL",
        help="""also each preset with this index, where it fits, such as 'FaissBinary("BHNSW32")'""",
    )  # fmt: skip
    recall.add_argument("--text", metavar="FILE", help="that a model reads (default: Shakespeare)")
    recall.add_argument("--train", type=int, metavar="STEPS", help="of hashes that are learned here (default: 150)")
    recall.add_argument("--seed", type=int, metavar="S", help="of what is drawn (default: 0)")


def check(arguments: argparse.Namespace) -> str:
    """What is measured: a key of TAKES.

    Raises:
        ValueError: arguments that do not go together, or numbers and files that cannot be.
        ImportError: what draws --plot is missing.
    """
    if arguments.rounds is not None and arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    if any(batch < 1 for batch in arguments.batch or ()):
        raise ValueError(f"--batch must be at least 1, got {min(arguments.batch)}")
    measured = mode_of(arguments)
    own = {name for names in TAKES.values() for name in names}
    for name in sorted(own - set(TAKES[measured])):
        given = getattr(arguments, name)
        if given is not None and given is not False:  # 0 was asked for, too
            places = ", ".join(mode for mode, names in TAKES.items() if name in names)
            raise ValueError(f"--{name.replace('_', '-')} goes with {places}, not with {measured}")
    if arguments.recall:
        for name in ("shape", "keys", "bits", "per", "rounds"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} does not go with --recall, whose presets and data have their own")
    if arguments.preset and (arguments.bits is not None or arguments.per):
        raise ValueError(f"--preset {arguments.preset} has its own bits and way to choose: leave --bits and --per out")
    if arguments.crossover and len(arguments.shape or ()) > 1:
        raise ValueError(f"--shape: --crossover takes one, got {_listed(arguments.shape)}")
    check_file("out", arguments.out, stdout=True)
    check_picture("plot", arguments.plot)
    return measured


def mode_of(arguments: argparse.Namespace) -> str:
    """What is measured: a key of TAKES.

    Raises:
        ValueError: --device cpu with what a GPU is needed for.
    """
    if arguments.recall:
        if arguments.device == "cuda":
            raise ValueError("--recall goes with --device cpu, not with --device cuda")
        return "--recall"
    mode = next((f" --{name}" for name in ("kinds", "e2e", "crossover") if getattr(arguments, name)), "")
    if mode and arguments.device == "cpu":
        raise ValueError(f"{mode.strip()} goes with --device cuda, not with --device cpu")
    return f"--device {'cuda' if mode else arguments.device or 'cpu'}{mode}"


def cuda_cases(
    shapes: Sequence[str] | None, batches: Sequence[int] | None, keys: Sequence[str] | None,
    default: Sequence[tuple[int, int, int]] = CUDA_KEYS,
) -> list[Case]:  # fmt: skip
    """Every shape with every batch and number of keys; with neither of the two, the default cases.

    Args:
        default: batch, keys, k.

    Raises:
        ValueError: what parse_shape and parse_keys refuse.
    """
    sizes = list(default)
    if batches or keys:
        pairs = [parse_keys(text) for text in keys or ()] or [(n, k) for batch, n, k in default if batch == 1]
        sizes = [(batch, n, k) for batch in batches or [1] for n, k in pairs]
    return [Case(*parse_shape(s), n, k, batch=batch) for s in shapes or CUDA_SHAPES for batch, n, k in sizes]


def _listed(words: Any) -> str:
    return " ".join(words)
