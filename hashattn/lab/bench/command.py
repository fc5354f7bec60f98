"""`hashattn bench`: the runs that its arguments ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hashattn.core.errors import refusals
from hashattn.lab.bench import arguments as options
from hashattn.lab.bench import report
from hashattn.lab.bench.arguments import PER, cuda_cases
from hashattn.lab.bench.cases import AUTO_KEYS, CUDA_SHAPES, KEYS, SHAPES, Case, parse_keys, parse_shape
from hashattn.lab.commands import for_people, write_json


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's subparsers."""
    bench = options.add(commands)
    bench.set_defaults(run=run, stopped=stopped)
    return bench


def stopped(arguments: argparse.Namespace) -> str:
    """What a stopped run leaves, and how to go on."""
    return "nothing was written; the same command begins anew, and fewer --keys, --rounds or --presets take less time"


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, measure, write the files and print the table; returns the exit status."""
    runs = {
        "--device cpu": _cpu, "--device cuda": _cuda, "--device cuda --kinds": _kinds,
        "--device cuda --e2e": _e2e, "--device cuda --crossover": _crossover, "--recall": _recall,
    }  # fmt: skip
    with refusals():
        mode = options.check(arguments)
    return runs[mode](arguments)


def _cpu(arguments: argparse.Namespace) -> int:
    from hashattn.core.threads import thread_count
    from hashattn.lab.bench import cpu

    with refusals():
        if len(arguments.per or ()) > 1:
            raise ValueError("--per takes one of kv_head and query_head with --device cpu")
        threads = [thread_count(t) for t in arguments.threads or [1]]
        keys = [parse_keys(text) for text in arguments.keys or ()] or list(AUTO_KEYS if arguments.auto else KEYS)
        shapes = [parse_shape(text) for text in arguments.shape or SHAPES]
        cases = [Case(*shape, n, k, t) for shape in shapes for n, k in keys for t in threads]
    result = cpu.run(
        cases, bits=128 if arguments.bits is None else arguments.bits, per=(arguments.per or ["kv_head"])[0],
        rounds=arguments.rounds or 9, sparse=not arguments.auto, progress=not arguments.quiet,
    )  # fmt: skip
    note = "Microseconds a layer, medians; every case was checked against the reference first."
    _finish(arguments, report.table(result["rows"]), note, result, device="cpu")
    return 0


def _cuda(arguments: argparse.Namespace) -> int:
    from hashattn.lab.bench import cuda, cuda_report

    with refusals():
        cases = cuda_cases(arguments.shape, arguments.batch, arguments.keys)
    result = cuda.run(
        cases, bits=64 if arguments.bits is None else arguments.bits, pers=arguments.per or PER,
        clustered=arguments.clustered, rounds=arguments.rounds or 11, progress=not arguments.quiet,
    )  # fmt: skip
    _finish(arguments, cuda_report.table(result["rows"]), cuda_report.NOTE, result, cuda_report.save_plot)
    return 0


def _kinds(arguments: argparse.Namespace) -> int:
    from hashattn.lab.bench import kinds, kinds_report

    with refusals():
        cases = cuda_cases(arguments.shape, arguments.batch, arguments.keys, kinds.SIZES)
    result = kinds.run(
        cases, bits=64 if arguments.bits is None else arguments.bits, pers=arguments.per or PER,
        rounds=arguments.rounds or 11, progress=not arguments.quiet,
    )  # fmt: skip
    _finish(arguments, kinds_report.table(result["rows"]), kinds_report.NOTE, result)
    return 0


def _e2e(arguments: argparse.Namespace) -> int:
    from hashattn.lab.bench import e2e, e2e_report

    with refusals():
        sizes = [parse_keys(text) for text in arguments.keys or ()] or e2e.KEYS
    result = e2e.run(
        sizes, batches=arguments.batch,
        bits=64 if arguments.bits is None else arguments.bits, pers=arguments.per or PER, preset=arguments.preset,
        compiled=not arguments.no_compile, rounds=arguments.rounds or 5,
        progress=not arguments.quiet,
    )  # fmt: skip
    _finish(arguments, e2e_report.table(result["rows"]), e2e_report.NOTE, result)
    return 0


def _crossover(arguments: argparse.Namespace) -> int:
    import torch

    from hashattn.lab.bench import crossover, crossover_report

    with refusals():
        shape = parse_shape(*(arguments.shape or CUDA_SHAPES))
    result = crossover.run(
        shape, arguments.batch or (1, 8), bits=64 if arguments.bits is None else arguments.bits,
        pers=arguments.per or PER, progress=not arguments.quiet,
    )  # fmt: skip
    gpu = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    entry = crossover_report.entry(*gpu, result["bytes"], arguments.out or "a run without --out")
    _finish(arguments, crossover_report.table(result["rows"]), f"{crossover_report.NOTE}\n{entry}", result)
    return 0


def _recall(arguments: argparse.Namespace) -> int:
    from hashattn.lab.bench import recall, recall_report
    from hashattn.lab.bench.recall_data import SYNTHETIC
    from hashattn.lab.workload.model import check_source
    from hashattn.lab.workload.texts import read_text

    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("data", "presets", "tokens", "queries", "layers", "index", "text", "train", "seed")
        if (value := getattr(arguments, name)) is not None
    }
    with refusals():
        if len(arguments.threads or ()) > 1:
            raise ValueError("--threads takes one number with --recall")
        if arguments.budget is not None:
            given["budget"] = recall.budget_of(arguments.budget)
        if arguments.threads:
            given["threads"] = arguments.threads[0]
        settings = recall.Settings(**given)
        for data in settings.data:
            if data != SYNTHETIC:
                check_source(data)
        if any(data != SYNTHETIC for data in settings.data):
            read_text(settings.text)
    result = recall.run(settings, progress=not arguments.quiet)
    drawn = recall_report.save_plot
    _finish(arguments, recall_report.table(result["rows"]), recall_report.NOTE, result, drawn, device="cpu")
    return 0


def _finish(
    arguments: argparse.Namespace, table: str, note: str, result: dict[str, Any],
    save_plot: Callable[[list[dict[str, Any]], Path], None] | None = None, device: str = "cuda",
) -> None:  # fmt: skip
    """Write a result to the files that were asked for, and print it, whether or not they could be written."""
    say = for_people(arguments.out)
    try:
        if arguments.out:
            write_json(arguments.out, report.environment(arguments.command_line, device) | result)
        if arguments.plot and save_plot is not None:
            save_plot(result["rows"], Path(arguments.plot))
    finally:
        say(f"{table}\n\n{note}")
        for remark in result.get("notes", ()):
            say(f"note: {remark}")
