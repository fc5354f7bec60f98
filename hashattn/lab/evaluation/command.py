"""`hashattn eval`: its arguments, and what it says."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict
from typing import Any

import torch

from hashattn.core.errors import refusals
from hashattn.core.extras import require
from hashattn.lab.checks import check_file, check_folder, device_of
from hashattn.lab.evaluation.contenders import Contender, contenders
from hashattn.lab.evaluation.run import PARTS, Settings
from hashattn.lab.options import (
    DTYPES,
    add_choices,
    add_device,
    add_model,
    add_numbers,
    add_presets,
    add_share,
    add_words,
    begin,
    from_options,
    takes_long,
)
from hashattn.lab.report import environment, for_people, write_json, write_text
from hashattn.lab.workload.retrieval import TASKS


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    default = Settings()
    command = begin(
        commands,
        "eval",
        run,
        "judge presets on a model: recall, mass, perplexity, retrieval",
        "Judges presets on a model, always beside full attention and exact top-k: what they keep of its "
        "attention, what they do to its perplexity, and whether it still finds what stands in a long text.",
    )
    left = "nothing was written; the same command begins anew, fewer --windows, --questions or --rows take less time"
    takes_long(command, left)
    add_model(command)
    add_presets(command, "--preset", "--presets", dest="presets", nargs="+", default=["dashkv_fast"])
    add_choices(command, [0.05])
    parts = f"which parts: {', '.join(PARTS)}; all if left out, none beside benchmarks"
    command.add_argument("--rows", nargs="+", choices=PARTS, metavar="PART", help=parts)
    tasks = f"tasks of retrieval, of {', '.join(TASKS)}"
    command.add_argument("--tasks", nargs="+", choices=TASKS, default=default.tasks, metavar="TASK", help=tasks)
    several = {
        "tokens": "lengths of windows and prompts, in tokens",
        "seeds": "seeds of places in the text, questions and random encoders",
    }
    add_numbers(command, int, several, default, nargs="+")
    numbers = {
        "windows": "windows of text, of each length and seed",
        "questions": "questions of each task, length and seed; needles stand at as many depths",
        "sparse": "tokens at the end of a window that are predicted by sparse attention",
        "decoded": "tokens that the model writes after a window, for recall on decoded keys",
        "queries": "queries that recall is measured with, of the last positions",
    }
    add_numbers(command, int, numbers, default)
    add_numbers(command, int, {"layers": "layers for recall; all of full attention if left out"}, nargs="+")
    command.add_argument("--simulate", action="store_true", help="perplexity of whole windows, every position sparse")
    add_words(command, {"text": ("FILE", "what is evaluated on; Shakespeare if left out")})
    add_share(command, 0.0, 1.0)
    files = {"longbench": "files of LongBench's QA tasks", "ruler": "files of RULER"}
    add_words(command, {name: ("FILE.jsonl", meaning) for name, meaning in files.items()}, nargs="+")
    add_device(command)
    weights = "of the model's weights; small differences are judged in float32 only"
    command.add_argument("--dtype", choices=DTYPES, default="float32", help=weights)
    written = {
        "json": ("FILE", "write all figures to this file, - for standard output"),
        "markdown": ("FILE", "write the tables to this file"),
        "plot": ("DIR", "write pictures to this folder"),
    }
    add_words(command, written)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, load the model, measure, write and print; returns the exit status."""
    with refusals():
        settings, entries = _checked(arguments)

        from hashattn.lab.evaluation import answers, benchmarks, report
        from hashattn.lab.evaluation.pictures import save_pictures
        from hashattn.lab.evaluation.run import run as evaluate
        from hashattn.lab.workload.model import check_source, load, name_of
        from hashattn.lab.workload.texts import check_share, read_text

        check_share(arguments.begin, arguments.end)
        check_source(arguments.model)
        asked = [q for path in arguments.longbench or () for q in benchmarks.read_longbench(path)]
        asked += [q for path in arguments.ruler or () for q in benchmarks.read_ruler(path)]
        text = read_text(arguments.text).share(arguments.begin, arguments.end)
        device = device_of(arguments.device)
        model, tokenizer = load(arguments.model, device=device, dtype=getattr(torch, arguments.dtype))
    progress = not arguments.quiet
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = []
        if arguments.rows is not None or not asked:
            records += evaluate(model, tokenizer, text, entries, settings, progress=progress)
        if asked:
            records += answers.run(model, tokenizer, asked, entries, progress=progress)
    notes = [*dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))]
    rows = report.summarise(records)
    notes += report.unsearched(rows)
    tables = report.markdown(rows)
    say = for_people(arguments.json)
    try:
        if arguments.json:
            about = environment(arguments.command_line, device.type)
            about |= {"model": name_of(arguments.model), "dtype": arguments.dtype, "text": text.name}
            about |= {"sha256": text.sha256, "share": [arguments.begin, arguments.end], "encoder": arguments.encoder}
            about |= {"notes": notes, "settings": asdict(settings)}
            write_json(arguments.json, about | {"rows": rows, "records": records})
        if arguments.markdown:
            write_text(arguments.markdown, tables + "\n")
    finally:  # what was measured is shown, whether or not it could be written
        say(f"\n{tables}")
        for note in notes:
            say(f"note: {note}")
    if arguments.plot:
        for path in save_pictures(records, rows, arguments.plot):
            say(f"wrote {path}")
    return 0


def _checked(arguments: argparse.Namespace) -> tuple[Settings, list[Contender]]:
    """What is measured on what, once nothing of the arguments that needs no model is in the way."""
    settings = from_options(Settings, arguments, parts=tuple(arguments.rows or PARTS))
    entries = contenders(arguments.presets, arguments.budget, arguments.dense_layers, arguments.encoder)
    check_file("json", arguments.json, stdout=True)
    check_file("markdown", arguments.markdown)
    check_folder("plot", arguments.plot, parents=False)
    if arguments.plot:
        require("matplotlib.figure", "demo", "--plot")  # missed now, not after the run
    return settings, entries
