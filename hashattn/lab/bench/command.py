"""`hashattn bench`: a benchmark for each question, and what it writes and prints."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hashattn.core.errors import UserError, refusals
from hashattn.lab.bench import arguments as options
from hashattn.lab.bench import tables
from hashattn.lab.bench.arguments import cuda_cases
from hashattn.lab.bench.cases import AUTO_KEYS, KEYS, PER, Case, Settings, parse_keys, parse_shape
from hashattn.lab.bench.tables import Table
from hashattn.lab.checks import STDOUT, check_file, check_picture, device_of
from hashattn.lab.options import add_words, begin, from_options, takes_long
from hashattn.lab.report import Row, environment, for_people, write_json

_STOPPED = "nothing was written; the same command begins anew, and fewer --keys, --rounds or --presets take less time"
_KEPT = "the file of --out holds what was measured; the same command begins anew, and fewer --tokens take less time"
_RANDOM = "Random keys: cost, not quality."
_CHECKED = f"Checked against the model as it is first. {_RANDOM} --out is written anew after each contender."
_ON_A_GPU = f"Needs an NVIDIA GPU. Checked against the reference first. {_RANDOM}"

_CROSSOVER = 'Checked against the reference first. What is found of a CPU is kept, and engine="auto" follows it.'


@dataclass(frozen=True)
class Found:
    """What a benchmark found, how to show it, and whether some of it failed."""

    result: dict[str, Any]
    text: str
    device: str = "cuda"
    save_plot: Callable[[Sequence[Row], Path], None] | None = None
    failed: bool = False

    @classmethod
    def of(cls, result: dict[str, Any], table: Table, **more: Any) -> Found:
        """Told by a table of its rows."""
        return cls(result, f"{table.text(result['rows'])}\n\n{table.note}", **more)


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    group = commands.add_parser(
        "bench",
        help="time decode steps against the fastest dense attention; compare presets",
        description="Each checks against the reference first, then measures. Without options it takes minutes.",
    )
    benchmarks = group.add_subparsers(required=True, metavar="BENCHMARK", help="what is measured:")
    step = "a decode step of one layer"
    for measure, options_of, summary, about in (
        (_cpu, options.cpu, f"{step} on a CPU", f"Checked against the reference first. {_RANDOM}"),
        (_gpu, options.gpu, f"{step} on a GPU, by its stages, beside FAISS's search and torch.topk", _ON_A_GPU),
        (_crossover, options.crossover, "from how many keys on a step is faster than dense", _CROSSOVER),
        (_kinds, options.kinds, "what each kind of step on a GPU costs beside TopK's", _ON_A_GPU),
        (_e2e, options.e2e, "tokens per second of a Llama-3-8B with random weights on a GPU", _ON_A_GPU),
        (_generate, options.generate, "what users get of model.generate(), stock and attached", _CHECKED),
        (_recall, options.recall, "what all presets keep of attention, against bytes and time", "On a CPU or a GPU."),
    ):
        name = measure.__name__[1:]
        bench = begin(benchmarks, name, partial(run, measure), summary, f"{summary[0].upper()}{summary[1:]}. {about}")
        takes_long(bench, _KEPT if measure is _generate else _STOPPED)
        options_of(bench)
        add_words(bench, {"out": ("FILE.json", "write the results to this file, - for standard output")})


def run(measure: Callable[[argparse.Namespace], Found], arguments: argparse.Namespace) -> int:
    """Check the arguments, measure, write the files and print the table; returns the exit status."""
    plot = getattr(arguments, "plot", None)
    with refusals():
        options.check_counts(arguments)
        check_file("out", arguments.out, stdout=True)
        check_picture("plot", plot)
    found = measure(arguments)
    say = for_people(arguments.out)
    try:
        if arguments.out:
            write_json(arguments.out, environment(arguments.command_line, found.device) | found.result)
        if plot and found.save_plot is not None:
            found.save_plot(found.result["rows"], Path(plot))
    finally:  # what was measured is shown, whether or not it could be written
        say(found.text)
        for remark in found.result.get("notes", ()):
            say(f"note: {remark}")
    return 1 if found.failed else 0


def check_spelling(words: Sequence[str]) -> None:
    """Raise UserError, with the new command line, for `hashattn bench` without the name of a benchmark."""
    if words[:1] != ["bench"] or {"-h", "--help"} & {*words} or (len(words) > 1 and not words[1].startswith("-")):
        return
    left, name, device = [], None, None
    given = iter(words[1:])
    for word in given:
        if word in ("--recall", "--e2e", "--kinds", "--crossover"):
            name = word[2:]
        elif word == "--device":
            device = next(given, None)
        elif word.startswith("--device="):
            device = word.partition("=")[2]
        else:
            left.append(word)
    name = name or ("gpu" if device == "cuda" else "cpu")
    raise UserError(f"bench takes the name of a benchmark: {shlex.join(['hashattn', 'bench', name, *left])}")


def _cpu(arguments: argparse.Namespace) -> Found:
    from hashattn.core.threads import thread_count
    from hashattn.lab.bench import cpu

    with refusals():
        threads = [thread_count(t) for t in arguments.threads]
        keys = [parse_keys(text) for text in arguments.keys or ()] or list(AUTO_KEYS if arguments.auto else KEYS)
        shapes = [parse_shape(text) for text in arguments.shape]
        cases = [Case(*shape, n, k, t) for shape in shapes for n, k in keys for t in threads]
    given = {name: getattr(arguments, name) for name in ("bits", "per", "rounds")}
    result = cpu.run(cases, **given, sparse=not arguments.auto, progress=not arguments.quiet)
    return Found.of(result, tables.CPU, device="cpu")


def _gpu(arguments: argparse.Namespace) -> Found:
    from hashattn.lab.bench import cuda, cuda_plot

    with refusals():
        cases = cuda_cases(arguments.shape, arguments.batch, arguments.keys)
    settings = _settings(arguments, clustered=arguments.clustered, rounds=arguments.rounds)
    result = cuda.run(cases, settings, progress=not arguments.quiet)
    return Found.of(result, tables.GPU, save_plot=cuda_plot.save_plot)


def _kinds(arguments: argparse.Namespace) -> Found:
    from hashattn.lab.bench import kinds

    with refusals():
        cases = cuda_cases(arguments.shape, arguments.batch, arguments.keys, kinds.SIZES)
    settings = _settings(arguments, rounds=arguments.rounds)
    return Found.of(
        kinds.run(cases, settings, only=arguments.kind, families=arguments.families, progress=not arguments.quiet),
        tables.KINDS,
    )


def _settings(arguments: argparse.Namespace, **more: Any) -> Settings:
    return Settings(bits=arguments.bits, pers=arguments.per, **more)


def _e2e(arguments: argparse.Namespace) -> Found:
    from hashattn.lab.bench import e2e
    from hashattn.lab.bench.e2e_model import Llama

    with refusals():
        if arguments.preset and (arguments.bits is not None or arguments.per):
            own = f"--preset {arguments.preset} has its own bits and way to choose"
            raise ValueError(f"{own}: leave --bits and --per out")
        sizes = [parse_keys(text) for text in arguments.keys or ()] or e2e.KEYS
    bits = 64 if arguments.bits is None else arguments.bits
    settings = e2e.Settings(sizes, arguments.batch, arguments.preset, bits, arguments.per or PER)
    how = {"compiled": not arguments.no_compile, "rounds": arguments.rounds, "progress": not arguments.quiet}
    return Found.of(e2e.run(settings, Llama(), **how), tables.E2E)


def _generate(arguments: argparse.Namespace) -> Found:
    from hashattn.lab.bench import generate
    from hashattn.lab.bench.generate_models import Source

    with refusals():
        device = device_of(arguments.device)
    gpu = device.type == "cuda"
    source = Source(
        arguments.model,
        arguments.shape or ("llama-3-8b" if gpu else "tiny"),
        arguments.layers,
        arguments.dtype or ("bfloat16" if gpu else "float32"),
    )
    settings = generate.Settings(
        source,
        arguments.tokens or ([65536, 131072] if gpu else [2000]),
        arguments.batch,
        arguments.preset or options.GENERATE_PRESETS,
        arguments.budget,
        arguments.steps,
        compiled=not arguments.no_compile,
        chunk=arguments.prefill_chunk,
        graph=arguments.graph,
        lossless=arguments.lossless,
    )
    where = environment(arguments.command_line, device.type)

    def keep(result: dict[str, Any]) -> None:
        if arguments.out not in (None, STDOUT):
            write_json(arguments.out, where | result)

    result = generate.run(settings, device, progress=not arguments.quiet, keep=keep)
    told = [f"{label} is left out: {why}" for label, why in result["failed"].items()]
    result["notes"] += told
    return Found.of(result, tables.GENERATE, device=device.type, failed=bool(told))


def _crossover(arguments: argparse.Namespace) -> Found:
    import torch

    from hashattn.lab.bench import crossover

    with refusals():
        shape = parse_shape(arguments.shape)
    if (arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return _crossover_on_a_cpu(arguments, shape)
    result = crossover.run(shape, arguments.batch, _settings(arguments), progress=not arguments.quiet)
    gpu = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    entry = crossover.entry(*gpu, result["bytes"], arguments.out or "a run without --out")
    found = Found.of(result, tables.CROSSOVER)
    return Found(result, f"{found.text}\n{entry}")


def _crossover_on_a_cpu(arguments: argparse.Namespace, shape: tuple[int, int, int, str]) -> Found:
    from hashattn.engines import cost
    from hashattn.lab.bench import crossover_cpu

    how = {"rounds": arguments.rounds, "progress": not arguments.quiet}
    result = crossover_cpu.run(shape=Case(*shape, 1, 1), **how)
    found = Found.of(result, tables.CROSSOVER_CPU, device="cpu")
    if arguments.no_keep:
        return found
    with refusals(OSError):
        path = cost.keep(cost.Costs(**result["costs"]))
    return Found(result, f'{found.text}\nKept in {path}: engine="auto" follows it.', "cpu")


def _recall(arguments: argparse.Namespace) -> Found:
    from hashattn.lab.bench import recall, recall_report
    from hashattn.lab.bench.recall_data import SYNTHETIC
    from hashattn.lab.workload.model import check_source
    from hashattn.lab.workload.texts import read_text

    with refusals():
        settings = from_options(recall.Settings, arguments)
        models = [data for data in settings.data if data != SYNTHETIC]
        for model in models:
            check_source(model)
        if models:
            read_text(settings.text)
    result = recall.run(settings, progress=not arguments.quiet)
    text = f"{recall_report.table(result['rows'])}\n\n{recall_report.NOTE}"
    return Found(result, text, settings.device, recall_report.save_plot)
