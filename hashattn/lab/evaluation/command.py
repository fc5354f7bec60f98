"""`hashattn eval`: its arguments, and what it says."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict
from typing import Any

import torch

from hashattn.core.errors import refusals
from hashattn.core.extras import require
from hashattn.core.files import replacing
from hashattn.lab.bench.report import environment
from hashattn.lab.commands import (
    DTYPES,
    Help,
    add_device,
    check_file,
    check_folder,
    device_of,
    for_people,
    share_or_own,
    write_json,
)
from hashattn.lab.evaluation.contenders import Contender, contenders
from hashattn.lab.evaluation.run import PARTS, Settings
from hashattn.lab.workload.retrieval import TASKS


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's subparsers."""
    default = Settings()
    each: argparse.ArgumentParser = commands.add_parser(
        "eval", help="judge presets on a model: recall, mass, perplexity, retrieval",
        description="Judges presets on a model, always beside full attention and exact top-k: what they keep of its "
        "attention, what they do to its perplexity, and whether it still finds what stands in a long text.",
        formatter_class=Help,
    )  # fmt: skip
    each.add_argument("--model", metavar="ID|DIR|GGUF",
                      help="hub id, folder, GGUF file or gemma-3-270m; SmolLM2-135M-Instruct if left out")  # fmt: skip
    each.add_argument(
        "--preset", "--presets", dest="presets", nargs="+", default=["dashkv_fast"], metavar="NAME[:OPTION=X,...]",
        help="with options, such as simhash_topk:query_bits=4; hashattn presets lists the names",
    )  # fmt: skip
    each.add_argument("--budget", type=share_or_own, nargs="+", default=[0.05], metavar="X|own",
                      help="shares of the keys; own is each preset's own")  # fmt: skip
    each.add_argument("--dense-layers", nargs="+", default=["preset"], metavar="preset|none|0,1,-1",
                      help="layers that attend densely: the preset's own, none, or these")  # fmt: skip
    each.add_argument("--encoder", metavar="DIR|NAME", help="fitted encoders, for the presets that take some")
    each.add_argument("--rows", nargs="+", choices=PARTS, default=None, metavar="PART",
                      help=f"which parts: {', '.join(PARTS)}; all if left out, none beside benchmarks")  # fmt: skip
    each.add_argument("--tokens", type=int, nargs="+", default=[*default.tokens], metavar="N",
                      help="lengths of windows and prompts, in tokens")  # fmt: skip
    each.add_argument(
        "--windows", type=int, default=default.windows, metavar="N", help="windows of text, of each length and seed"
    )
    each.add_argument("--questions", type=int, default=default.questions, metavar="N",
                      help="questions of each task, length and seed; needles stand at as many depths")  # fmt: skip
    each.add_argument("--tasks", nargs="+", choices=TASKS, default=[*default.tasks], metavar="TASK",
                      help=f"tasks of retrieval, of {', '.join(TASKS)}")  # fmt: skip
    each.add_argument("--seeds", type=int, nargs="+", default=[*default.seeds], metavar="N",
                      help="seeds of places in the text, questions and random encoders")  # fmt: skip
    each.add_argument("--sparse", type=int, default=default.sparse, metavar="N",
                      help="tokens at the end of a window that are predicted by sparse attention")  # fmt: skip
    each.add_argument("--simulate", action="store_true",
                      help="perplexity of whole windows, every position sparse")  # fmt: skip
    each.add_argument("--decoded", type=int, default=default.decoded, metavar="N",
                      help="tokens that the model writes after a window, for recall on decoded keys")  # fmt: skip
    each.add_argument("--queries", type=int, default=default.queries, metavar="N",
                      help="queries that recall is measured with, of the last positions")  # fmt: skip
    each.add_argument(
        "--layers", type=int, nargs="+", metavar="I", help="layers for recall; all of full attention if left out"
    )
    each.add_argument("--text", metavar="FILE", help="what is evaluated on; Shakespeare if left out")
    for name, place, end in (("from", 0.0, "begin"), ("to", 1.0, "end")):
        each.add_argument(f"--{name}", type=float, default=place, metavar="X", dest=end,
                          help=f"where in the text to {end}, 0 its start and 1 its end")  # fmt: skip
    each.add_argument("--longbench", nargs="+", metavar="FILE.jsonl", help="files of LongBench's QA tasks")
    each.add_argument("--ruler", nargs="+", metavar="FILE.jsonl", help="files of RULER")
    add_device(each)
    each.add_argument("--dtype", choices=DTYPES, default="float32",
                      help="of the model's weights; small differences are judged in float32 only")  # fmt: skip
    each.add_argument("--json", metavar="FILE", help="write all figures to this file, - for standard output")
    each.add_argument("--markdown", metavar="FILE", help="write the tables to this file")
    each.add_argument("--plot", metavar="DIR", help="write pictures to this folder")
    each.set_defaults(run=run, stopped=stopped)
    return each


def stopped(arguments: argparse.Namespace) -> str:
    """What a stopped evaluation leaves, and how to go on."""
    return "nothing was written; the same command begins anew, fewer --windows, --questions or --rows take less time"


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
            said = {
                "model": name_of(arguments.model), "dtype": arguments.dtype, "text": text.name, "sha256": text.sha256,
                "share": [arguments.begin, arguments.end], "encoder": arguments.encoder, "notes": notes,
                "settings": asdict(settings),
            }  # fmt: skip
            about = environment(arguments.command_line, device.type)
            write_json(arguments.json, about | said | {"rows": rows, "records": records})
        if arguments.markdown:
            with replacing(arguments.markdown) as scratch:
                scratch.write_text(tables + "\n", encoding="utf-8")
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
    settings = Settings(
        parts=PARTS if arguments.rows is None else tuple(arguments.rows), tokens=tuple(arguments.tokens),
        windows=arguments.windows, questions=arguments.questions, tasks=tuple(arguments.tasks),
        seeds=tuple(arguments.seeds), sparse=arguments.sparse, simulate=arguments.simulate, decoded=arguments.decoded,
        queries=arguments.queries, layers=None if arguments.layers is None else tuple(arguments.layers),
    )  # fmt: skip
    entries = contenders(arguments.presets, arguments.budget, arguments.dense_layers, arguments.encoder)
    check_file("json", arguments.json, stdout=True)
    check_file("markdown", arguments.markdown)
    check_folder("plot", arguments.plot, parents=False)
    if arguments.plot:
        require("matplotlib.figure", "demo", "--plot")  # missed now, not after the run
    return settings, entries
