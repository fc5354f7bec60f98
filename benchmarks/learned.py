"""Everything that docs/results.md shows of one model: captures it, fits each recipe to it, judges all of them.

python benchmarks/learned.py --work DIR                        SmolLM2-135M-Instruct
python benchmarks/learned.py --work DIR --model gemma-3-270m   Gemma-3-270M

The same command goes on where it was stopped: `hashattn capture` and `hashattn fit` resume, and results that are there
are not made again. Results go to benchmarks/results; `python benchmarks/learned_tables.py` makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hashattn.cli import main as hashattn
from hashattn.files import replacing

RESULTS = Path(__file__).parent / "results"
LINEAR = ["--query-hidden", "none"]
PAPER = ["--loss", "kl + 0.1 * balance + 0.1 * quantisation", "--temperature", "1"]
RECIPES: dict[str, list[str]] = {
    "dashkv": [*PAPER, "--calibrate"],  # as readings of the paper give it
    "dashkv-symmetric": [*PAPER, "--encoder", "symmetric", "--calibrate"],
    "asymmetric": ["--calibrate"],
    "symmetric": ["--encoder", "symmetric"],
    "asymmetric-32": ["--bits", "32"],
    "asymmetric-64": ["--bits", "64"],
    "asymmetric-256": ["--bits", "256"],
    "linear": LINEAR,
    "planes": [*LINEAR, "--query-bits", "4"],
    "bias": [*LINEAR, "--bias-bits", "8"],
    "bias-64": [*LINEAR, "--bias-bits", "8", "--bits", "64"],
    "bias-heads": [*LINEAR, "--bias-bits", "8", "--heads", "kv"],
    "itq": ["--encoder", "itq"],
}
LAYERS = {"smollm2-135m": [*range(2, 30)], "gemma-3-270m": [5, 11, 17]}  # what attends sparsely
# Presets that are judged on tensors, and end to end; {name} is the folder of a recipe.
ENCODERS = [
    "simhash_topk",
    "simhash_topk:query_bits=4",
    *(f"dashkv_hash_only:pretrained={{{name}}}" for name, options in RECIPES.items() if "--encoder" not in options),
    "hata:pretrained={symmetric}",
    "hata:pretrained={dashkv-symmetric}",
]
COMPOSITIONS = [
    "simhash_topk",
    "simhash_topk:query_bits=4",
    "dashkv_hash_only:pretrained={dashkv}",
    "dashkv_consensus:pretrained={dashkv}",
    "dashkv_momentum:pretrained={dashkv}",
    "dashkv:pretrained={dashkv}",
    "dashkv_symmetric:pretrained={dashkv-symmetric}",
    "dashkv_hash_only:pretrained={asymmetric}",
    "dashkv:pretrained={asymmetric}",
    "dashkv_hash_only:pretrained={planes}",
    "dashkv_hash_only:pretrained={bias}",
    "dashkv_fast:pretrained={bias}",
    "dashkv_fast:pretrained={bias},combine=normalised",
    "streaming",
]


def run(*arguments: str) -> None:
    """A command of hashattn; ends this script where it fails."""
    print("hashattn", *arguments, file=sys.stderr, flush=True)
    if status := hashattn(arguments):
        sys.exit(status)


def fit(shards: Path, out: Path, options: Sequence[str], processes: int) -> None:
    """`hashattn fit`, its layers shared among processes; ends this script where one fails."""
    command = [sys.executable, "-m", "hashattn.cli", "fit", str(shards), "--out", str(out), *options]
    print(*command, file=sys.stderr, flush=True)
    started = [
        subprocess.Popen(command, env=os.environ | {"RANK": str(i), "WORLD_SIZE": str(processes)})
        for i in range(processes)
    ]
    if status := max(process.wait() for process in started):
        sys.exit(status)


def judge(out: Path, model: list[str], presets: Sequence[str], folders: dict[str, str], options: Sequence[str]) -> None:
    """`hashattn eval`, unless its results are there; of folders only the names are kept."""
    if out.exists():
        return
    named = [preset.format(**folders) for preset in presets]
    scratch = out.with_suffix(".part")
    run("eval", *model, "--presets", *named, *options, "--json", str(scratch))
    text = scratch.read_text(encoding="utf-8")
    for name, folder in folders.items():
        text = text.replace(json.dumps(folder)[1:-1], name)
    with replacing(out) as path:
        path.write_text(text, encoding="utf-8")
    scratch.unlink()


def study(
    name: str, work: Path, *, tokens: int, context: int, steps: int, windows: int, questions: int, processes: int,
    results: Path, device: list[str],
) -> None:  # fmt: skip
    """Capture, fit and judge one model, in `work`; texts to fit and to judge lie apart."""
    model = [] if name == "smollm2-135m" else ["--model", name]
    layers = [str(i) for i in LAYERS[name]]
    shards = work / "shards"
    run("capture", *model, "--out", str(shards), "--from", "0.4", "--to", "0.7", "--tokens", str(tokens), "--sequences",
        "6", "--retrieval", "6", "--layers", *layers, *device)  # fmt: skip
    folders, fits = {}, {}
    for recipe, options in RECIPES.items():
        own = work / recipe
        fit(shards, own, ["--steps", str(steps), "--every", str(max(1, steps // 10)), *options, *device], processes)
        folders[recipe] = str(own / "pretrained")
        records = [json.loads((own / f"layer-{int(i):02d}.json").read_text(encoding="utf-8")) for i in layers]
        fits[recipe] = {"options": options, "layers": dict(zip(layers, records, strict=True))}
    with replacing(results / f"fits_{name}.json") as path:
        path.write_text(json.dumps({"steps": steps, "tokens": tokens, "recipes": fits}), encoding="utf-8")
    apart = ["--from", "0", "--to", "0.35", *device]
    tensors = ["--rows", "tensors", "--tokens", str(tokens), "--windows", "4", "--queries", "64", "--layers", *layers]
    judge(results / f"encoders_{name}.json", model, ENCODERS, folders, [*tensors, *apart])
    whole = ["--rows", "perplexity", "retrieval", "--tokens", str(context), "--windows", str(windows), "--questions",
             str(questions), "--budget", "0.05", "0.1"]  # fmt: skip
    judge(results / f"compositions_{name}.json", model, COMPOSITIONS, folders, [*whole, *apart])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and fits")
    parser.add_argument("--model", choices=LAYERS, default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8000, help="of a captured sequence and a judged window")
    parser.add_argument("--context", type=int, default=4096, help="tokens of what is judged end to end")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for results")
    parser.add_argument("--steps", type=int, default=1500, help="of a fit")
    parser.add_argument("--windows", type=int, default=12, help="whose perplexity is judged")
    parser.add_argument("--questions", type=int, default=16, help="of each retrieval task")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that share the layers of a fit")
    parser.add_argument("--device", help="cpu or cuda; cuda if there is one, if left out")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    study(
        chosen.model, chosen.work, tokens=chosen.tokens, context=chosen.context, results=chosen.results,
        steps=chosen.steps, windows=chosen.windows,
        questions=chosen.questions, processes=chosen.processes,
        device=["--device", chosen.device] if chosen.device else [],
    )  # fmt: skip


if __name__ == "__main__":
    main()
