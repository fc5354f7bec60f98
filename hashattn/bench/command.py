"""`hashattn bench`: its arguments, and the runs that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hashattn.bench.cases import AUTO_KEYS, CUDA_KEYS, CUDA_SHAPES, KEYS, SHAPES, Case, parse_keys, parse_shape
from hashattn.bench.report import check_folder
from hashattn.extras import require

PER = ("query_head", "kv_head")
ONLY = {"cpu": ("threads", "auto"), "cuda": ("batch", "clustered", "plot")}  # arguments of one device


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's subparsers. Defaults depend on the device, so that None stands for them."""
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench", help="time a decode step against the fastest dense attention",
        description="One decode step of one layer, checked against the reference first, then timed against the fastest "
        "dense attention in the same run. Random keys: cost, not quality. Without --shape and --keys it takes minutes.",
    )  # fmt: skip
    bench.add_argument("--device", default="cpu", choices=list(ONLY), help="what to measure (default: cpu)")
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
    bench.add_argument("--bits", type=int, help="of the codes, 8 to 1024 (default: 128; cuda: 64, or 128 or 256)")
    bench.add_argument(
        "--per", nargs="+", choices=PER, help="who chooses keys: a group or each head (default: kv_head; cuda: both)"
    )
    bench.add_argument("--rounds", type=int, metavar="R", help="turns of which medians are taken (default: 9; cuda 11)")
    bench.add_argument("--out", metavar="FILE.json", help="write the results to this file")
    cpu = bench.add_argument_group("with --device cpu")
    cpu.add_argument("--threads", nargs="+", type=int, metavar="T", help="threads of torch and the scan (default: 1)")
    cpu.add_argument(
        "--auto", action="store_true",
        help='only compare engine="auto" with dense attention, by default from 128 to 8,192 keys',
    )  # fmt: skip
    cuda = bench.add_argument_group("with --device cuda")
    cuda.add_argument("--batch", nargs="+", type=int, metavar="B", help="sequences (with --keys; default: 1)")
    cuda.add_argument("--clustered", action="store_true", help="all near keys in one sixty-fourth of the tokens")
    cuda.add_argument("--plot", metavar="FILE.png", help="write a picture of latency against keys to this file")
    bench.set_defaults(run=run)
    return bench


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, measure, print the table and write the files; returns the exit status."""
    if arguments.rounds is not None and arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    for device, names in ONLY.items():
        for name in names:
            if device != arguments.device and getattr(arguments, name):
                raise ValueError(f"--{name} goes with --device {device}, not {arguments.device}")
    check_folder("out", arguments.out)
    check_folder("plot", arguments.plot)
    return _cuda(arguments) if arguments.device == "cuda" else _cpu(arguments)


def _cpu(arguments: argparse.Namespace) -> int:
    from hashattn.bench import cpu, report
    from hashattn.threads import thread_count

    if len(arguments.per or ()) > 1:
        raise ValueError("--per takes one of kv_head and query_head with --device cpu")
    threads = [thread_count(t) for t in arguments.threads or [1]]
    keys = [parse_keys(text) for text in arguments.keys or ()] or list(AUTO_KEYS if arguments.auto else KEYS)
    shapes = [parse_shape(text) for text in arguments.shape or SHAPES]
    cases = [Case(*shape, n, k, t) for shape in shapes for n, k in keys for t in threads]
    result = cpu.run(
        cases, bits=128 if arguments.bits is None else arguments.bits, per=(arguments.per or ["kv_head"])[0],
        rounds=arguments.rounds or 9, sparse=not arguments.auto,
    )  # fmt: skip
    print(report.table(result["rows"]))
    print("\nMicroseconds a layer, medians; every case was checked against the reference first.")
    if arguments.out:
        report.write(Path(arguments.out), report.environment(arguments.command_line) | result)
    return 0


def _cuda(arguments: argparse.Namespace) -> int:
    from hashattn.bench import cuda, cuda_report, report

    if arguments.plot:
        require("matplotlib.figure", "demo", "--plot")  # missed now, not after the run
    cases = cuda_cases(arguments.shape, arguments.batch, arguments.keys)
    result = cuda.run(
        cases, bits=64 if arguments.bits is None else arguments.bits, pers=arguments.per or PER,
        clustered=arguments.clustered, rounds=arguments.rounds or 11,
    )  # fmt: skip
    print(cuda_report.table(result["rows"]))
    print(f"\n{cuda_report.NOTE}")
    for note in result["notes"]:
        print(f"note: {note}")
    if arguments.out:
        report.write(Path(arguments.out), report.environment(arguments.command_line, "cuda") | result)
    if arguments.plot:
        cuda_report.save_plot(result["rows"], Path(arguments.plot))
    return 0


def cuda_cases(shapes: Sequence[str] | None, batches: Sequence[int] | None, keys: Sequence[str] | None) -> list[Case]:
    """Every shape with every batch and number of keys; with neither of the two, the default cases.

    Raises:
        ValueError: a batch below 1, or what parse_shape and parse_keys refuse.
    """
    if any(batch < 1 for batch in batches or ()):
        raise ValueError(f"--batch must be at least 1, got {min(batches or ())}")
    sizes: list[tuple[int, int, int]] = list(CUDA_KEYS)
    if batches or keys:
        pairs = [parse_keys(text) for text in keys or ()] or [(n, k) for batch, n, k in CUDA_KEYS if batch == 1]
        sizes = [(batch, n, k) for batch in batches or [1] for n, k in pairs]
    return [Case(*parse_shape(s), n, k, batch=batch) for s in shapes or CUDA_SHAPES for batch, n, k in sizes]


def _listed(words: Any) -> str:
    return " ".join(words)
