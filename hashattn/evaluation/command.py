"""`hashattn eval`: its arguments, and what it says."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hashattn.bench.report import check_folder, environment
from hashattn.bench.report import write as write_json
from hashattn.evaluation.contenders import contenders
from hashattn.evaluation.run import PARTS, Settings
from hashattn.extras import require
from hashattn.files import replacing
from hashattn.presets import PRESETS
from hashattn.workload.retrieval import TASKS

DTYPES = ("float32", "bfloat16", "float16")


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's subparsers."""
    default = Settings()
    each: argparse.ArgumentParser = commands.add_parser(
        "eval", help="judge presets on a model: recall, mass, perplexity, retrieval",
        description="Judges presets on a model, always beside full attention and exact top-k: what they keep of its "
        "attention, what they do to its perplexity, and whether it still finds what stands in a long text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    each.add_argument("--model", metavar="ID|DIR|GGUF",
                      help="hub id, folder, GGUF file or gemma-3-270m; SmolLM2-135M-Instruct if left out")  # fmt: skip
    each.add_argument(
        "--preset", "--presets", dest="presets", nargs="+", default=["dashkv_fast"], metavar="NAME[:OPTION=X,...]",
        help=f"with options, such as simhash_topk:query_bits=4; of {', '.join(PRESETS)}",
    )  # fmt: skip
    each.add_argument("--budget", type=_budget, nargs="+", default=[0.05], metavar="X|own",
                      help="shares of the keys; own is each preset's own")  # fmt: skip
    each.add_argument("--dense-layers", nargs="+", default=["preset"], metavar="preset|none|0,1,-1",
                      help="layers that attend densely: the preset's own, none, or these")  # fmt: skip
    each.add_argument("--encoder", metavar="DIR|NAME", help="fitted encoders, for the presets that take some")
    each.add_argument("--rows", nargs="+", choices=PARTS, default=None, metavar="PART",
                      help=f"which parts: {', '.join(PARTS)}; all if left out, none beside benchmarks")  # fmt: skip
    each.add_argument("--tokens", type=int, nargs="+", default=[*default.tokens], metavar="N",
                      help="lengths of windows and prompts")  # fmt: skip
    each.add_argument("--windows", type=int, default=default.windows, metavar="N", help="of each length and seed")
    each.add_argument("--questions", type=int, default=default.questions, metavar="N",
                      help="of each task, length and seed; needles stand at as many depths")  # fmt: skip
    each.add_argument("--tasks", nargs="+", choices=TASKS, default=[*default.tasks], metavar="TASK",
                      help=f"of {', '.join(TASKS)}")  # fmt: skip
    each.add_argument("--seeds", type=int, nargs="+", default=[*default.seeds], metavar="N",
                      help="of places in the text, questions and random encoders")  # fmt: skip
    each.add_argument("--sparse", type=int, default=default.sparse, metavar="N",
                      help="tokens at the end of a window that are predicted by sparse attention")  # fmt: skip
    each.add_argument("--simulate", action="store_true",
                      help="perplexity of whole windows, every position sparse")  # fmt: skip
    each.add_argument("--decoded", type=int, default=default.decoded, metavar="N",
                      help="tokens that the model writes after a window, for recall on decoded keys")  # fmt: skip
    each.add_argument("--queries", type=int, default=default.queries, metavar="N",
                      help="of the last positions, that recall is measured with")  # fmt: skip
    each.add_argument(
        "--layers", type=int, nargs="+", metavar="I", help="for recall; all of full attention if left out"
    )
    each.add_argument("--text", metavar="FILE", help="what is evaluated on; Shakespeare if left out")
    for name, place, end in (("from", 0.0, "begin"), ("to", 1.0, "end")):
        each.add_argument(f"--{name}", type=float, default=place, metavar="X", dest=end,
                          help=f"where in the text to {end}, 0 its start and 1 its end")  # fmt: skip
    each.add_argument("--longbench", nargs="+", metavar="FILE.jsonl", help="files of LongBench's QA tasks")
    each.add_argument("--ruler", nargs="+", metavar="FILE.jsonl", help="files of RULER")
    each.add_argument("--device", help="cpu or cuda; cuda if there is one, if left out")
    each.add_argument("--dtype", choices=DTYPES, default="float32",
                      help="of the model; small differences are judged in float32 only")  # fmt: skip
    each.add_argument("--json", metavar="FILE", help="write all figures to this file")
    each.add_argument("--markdown", metavar="FILE", help="write the tables to this file")
    each.add_argument("--plot", metavar="DIR", help="write pictures to this folder")
    each.set_defaults(run=run)
    return each


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, load the model, measure, print and write; returns the exit status."""
    files = [*(arguments.longbench or ()), *(arguments.ruler or ())]
    parts = PARTS if arguments.rows is None else tuple(arguments.rows)
    settings = Settings(
        parts=parts, tokens=tuple(arguments.tokens), windows=arguments.windows, questions=arguments.questions,
        tasks=tuple(arguments.tasks), seeds=tuple(arguments.seeds), sparse=arguments.sparse,
        simulate=arguments.simulate, decoded=arguments.decoded, queries=arguments.queries,
        layers=None if arguments.layers is None else tuple(arguments.layers),
    )  # fmt: skip
    entries = contenders(arguments.presets, arguments.budget, arguments.dense_layers, arguments.encoder)
    for name in ("json", "markdown", "plot"):
        check_folder(name, getattr(arguments, name))
    if arguments.plot:
        require("matplotlib.figure", "demo", "--plot")  # missed now, not after the run

    import torch

    from hashattn.evaluation import answers, benchmarks, report
    from hashattn.evaluation.pictures import save_pictures
    from hashattn.evaluation.run import run as evaluate
    from hashattn.workload.model import load, name_of
    from hashattn.workload.texts import read_text

    asked = [q for path in arguments.longbench or () for q in benchmarks.read_longbench(path)]
    asked += [q for path in arguments.ruler or () for q in benchmarks.read_ruler(path)]
    text = read_text(arguments.text).share(arguments.begin, arguments.end)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(arguments.model, device=device, dtype=getattr(torch, arguments.dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = []
        if arguments.rows is not None or not files:
            records += evaluate(model, tokenizer, text, entries, settings, progress=True)
        if files:
            records += answers.run(model, tokenizer, asked, entries, progress=True)
    notes = [*dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))]
    rows = report.summarise(records)
    notes += report.unsearched(rows)
    tables = report.markdown(rows)
    print(f"\n{tables}")
    for note in notes:
        print(f"note: {note}")
    if arguments.json:
        kind = "cuda" if torch.device(device).type == "cuda" else "cpu"
        said = {
            "model": name_of(arguments.model), "dtype": arguments.dtype, "text": text.name, "sha256": text.sha256,
            "share": [arguments.begin, arguments.end], "encoder": arguments.encoder, "notes": notes,
            "settings": asdict(settings),
        }  # fmt: skip
        write_json(
            Path(arguments.json), environment(arguments.command_line, kind) | said | {"rows": rows, "records": records}
        )
    if arguments.markdown:
        with replacing(arguments.markdown) as scratch:
            scratch.write_text(tables + "\n", encoding="utf-8")
    if arguments.plot:
        for path in save_pictures(records, rows, arguments.plot):
            print(f"wrote {path}")
    return 0


def _budget(text: str) -> float | None:
    return None if text == "own" else float(text)
