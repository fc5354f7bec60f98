"""Everything that docs/results.md shows of one model: captures it, fits each recipe to it, judges all of them.

python benchmarks/quality.py --work DIR                                  SmolLM2-135M-Instruct
python benchmarks/quality.py --work DIR --model gemma-3-270m --seeds 6   Gemma-3-270M

The same command goes on where it was stopped: `hashattn capture` and `hashattn fit` resume, and results that are there
are not made again. Results go to benchmarks/results; `python benchmarks/quality_tables.py` makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hashattn.core.files import replacing
from hashattn.encoders.losses import HATA
from hashattn.lab.evaluation.report import summarise

RESULTS = Path(__file__).parent / "results"
LINEAR = ["--query-hidden", "none"]
FORCED = "sinks=4,recent=64"
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
    "planes-2": [*LINEAR, "--query-bits", "2"],
    "bias": [*LINEAR, "--bias-bits", "8"],
    "bias-64": [*LINEAR, "--bias-bits", "8", "--bits", "64"],
    "bias-heads": [*LINEAR, "--bias-bits", "8", "--heads", "kv"],
    # The encoders of peers, by their own losses.
    "hata": ["--preset", "hata", "--loss", HATA],
    "hashattention": ["--preset", "hashattention", "--loss", "bce"],
    "spotlight": ["--preset", "spotlight"],
    "itq": ["--preset", "itq:query_bits=8"],
    "spectral": ["--preset", "spectral"],
    "alsh": ["--preset", "alsh"],
    "pqcache": ["--preset", "pqcache"],
    "pq-16": ["--preset", "pqcache:subquantisers=16,sub_bits=8"],
    "loki": ["--preset", "loki"],
    "double_sparsity": ["--preset", "double_sparsity"],
}
LAYERS = {"smollm2-135m": [*range(2, 30)], "gemma-3-270m": [5, 11, 17]}  # what attends sparsely
DENSE = {"smollm2-135m": "0,1", "gemma-3-270m": "none"}  # of the layers of full attention, alike for all presets
# Presets that are judged on tensors, and end to end; {name} is the folder of a recipe.
ENCODERS = [
    "simhash_topk",
    "simhash_topk:query_bits=4",
    *(
        f"dashkv_hash_only:pretrained={{{name}}}"
        for name, options in RECIPES.items()
        if not {"--encoder", "--preset"} & {*options}
    ),
    "hata:pretrained={symmetric}",
    "hata:pretrained={dashkv-symmetric}",
    "itq:query_bits=8,pretrained={itq}",
    "pqcache:subquantisers=16,sub_bits=8,pretrained={pq-16}",
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
    "dashkv_fast:pretrained={planes}",
    "dashkv_fast:pretrained={planes-2}",
    "dashkv_fast:pretrained={planes-2},per=kv_head",
    "dashkv_fast:pretrained={planes-2},per=kv_head,combine=normalised",
    "dashkv_fast:pretrained={bias}",
    "dashkv_fast:pretrained={bias-heads}",
    "dashkv_fast:pretrained={bias},per=kv_head",
    "dashkv_fast:pretrained={bias},per=kv_head,combine=normalised",
    "streaming",
]
# Peers, with 4 sinks and 64 recent keys in the budget if they force any, and as published beside where that matters.
PEERS = [
    "hata:pretrained={hata}",
    f"hashattention:{FORCED},pretrained={{hashattention}}",
    "spotlight:pretrained={spotlight}",
    "itq:query_bits=8,pretrained={itq}",
    "spectral:pretrained={spectral}",
    "alsh:pretrained={alsh}",
    "reformer",
    "magicpig",
    f"pqcache:{FORCED},pretrained={{pqcache}}",
    f"pqcache:subquantisers=16,sub_bits=8,{FORCED},pretrained={{pq-16}}",
    "rabitq",
    f"quest:{FORCED}",
    "quest",
    "loki:pretrained={loki}",
    "sparq",
    "double_sparsity:pretrained={double_sparsity}",
    "faiss_hnsw",
    "faiss_ivf",
    "twilight",
    "vattention",
    "h2o",
    "snapkv",
    "pyramidkv:layers={depth}",
]
DEPTH = {"smollm2-135m": "30", "gemma-3-270m": "18"}


def together(commands: Sequence[Sequence[str]], processes: int, **variables: Sequence[str]) -> None:
    """Commands, so many at a time, each with its own value of the variables; ends this script where one fails.

    On one GPU they run beside each other only under NVIDIA's Multi-Process Service.
    """
    print(*commands[0], file=sys.stderr, flush=True)

    def one(i: int) -> int:
        own = {name: values[i] for name, values in variables.items()}
        return subprocess.run(commands[i], env=os.environ | own, check=False).returncode

    with ThreadPoolExecutor(processes) as pool:
        if status := max(pool.map(one, range(len(commands)))):
            sys.exit(status)


def fit(shards: Path, out: Path, options: Sequence[str], processes: int) -> None:
    """`hashattn fit`, its layers shared among processes."""
    command = [sys.executable, "-m", "hashattn.cli", "fit", str(shards), "--out", str(out), *options]
    ranks = [str(i) for i in range(processes)]
    together([command] * processes, processes, RANK=ranks, WORLD_SIZE=[str(processes)] * processes)


def judge(
    out: Path, model: list[str], presets: Sequence[str], folders: dict[str, str], options: Sequence[str],
    seeds: int, processes: int, depth: str = "",
) -> None:  # fmt: skip
    """`hashattn eval`, a process a seed, unless its results are there; of folders only the names are kept."""
    if out.exists():
        return
    named = [preset.format(**folders, depth=depth) for preset in presets]
    command = [sys.executable, "-m", "hashattn.cli", "eval", *model, "--presets", *named, *options]
    with tempfile.TemporaryDirectory() as scratch:
        parts = [Path(scratch, f"{seed}.json") for seed in range(seeds)]
        together([[*command, "--seeds", str(i), "--json", str(path)] for i, path in enumerate(parts)], processes)
        texts = [path.read_text(encoding="utf-8") for path in parts]
    for name, folder in folders.items():
        texts = [text.replace(json.dumps(folder)[1:-1], name) for text in texts]
    found = [json.loads(text) for text in texts]
    whole = {
        **{name: value for name, value in found[0].items() if name != "records"},  # of each window: many
        "settings": found[0]["settings"] | {"seeds": [*range(seeds)]},
        "notes": [*dict.fromkeys(note for result in found for note in result["notes"])],
        "command": " ".join(["python benchmarks/quality.py", *model, "--seeds", str(seeds)]),
        "rows": summarise(record for result in found for record in result["records"]),
    }
    with replacing(out) as path:
        path.write_text(json.dumps(whole), encoding="utf-8")


def study(
    name: str, work: Path, *, tokens: int, context: int, steps: int, seeds: int, processes: int, results: Path,
    device: list[str],
) -> None:  # fmt: skip
    """Capture, fit and judge one model, in `work`; texts to fit and to judge lie apart."""
    model = [] if name == "smollm2-135m" else ["--model", name]
    layers = [str(i) for i in LAYERS[name]]
    shards = work / "shards"
    capture = ["capture", *model, "--out", str(shards), "--from", "0.4", "--to", "0.7", "--tokens", str(tokens),
               "--sequences", "6", "--retrieval", "6", "--layers", *layers, *device]  # fmt: skip
    together([[sys.executable, "-m", "hashattn.cli", *capture]], 1)  # a process that gives its memory back
    folders = {}
    for recipe, options in RECIPES.items():
        own = work / recipe
        folders[recipe] = str(own / "pretrained")
        if not (own / "pretrained").exists():
            fit(shards, own, ["--steps", str(steps), "--every", str(max(1, steps // 10)), *options, *device], processes)
    apart = ["--from", "0", "--to", "0.35", *device]
    tensors = ["--rows", "tensors", "--tokens", str(tokens), "--windows", "1", "--queries", "64", "--layers", *layers]
    judge(results / f"encoders_{name}.json", model, ENCODERS, folders, [*tensors, *apart], seeds, processes)
    whole = ["--rows", "perplexity", "retrieval", "--tokens", str(context), "--windows", "2", "--questions", "2",
             "--budget", "0.05", "0.1", "--dense-layers", DENSE[name]]  # fmt: skip
    for kind, presets in (("compositions", COMPOSITIONS), ("peers", PEERS)):
        out = results / f"{kind}_{name}.json"
        judge(out, model, presets, folders, [*whole, *apart], seeds, processes, DEPTH[name])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and fits")
    parser.add_argument("--model", choices=LAYERS, default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8000, help="of a captured sequence and a judged window")
    parser.add_argument("--context", type=int, default=4096, help="tokens of what is judged end to end")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for results")
    parser.add_argument("--steps", type=int, default=1500, help="of a fit")
    parser.add_argument(
        "--seeds", type=int, default=8, metavar="N", help="that are judged: each has windows and questions of its own"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="that share the layers of a fit, and the seeds"
    )
    parser.add_argument("--device", help="cpu or cuda; cuda if there is one, if left out")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    study(
        chosen.model, chosen.work, tokens=chosen.tokens, context=chosen.context, results=chosen.results,
        steps=chosen.steps, seeds=chosen.seeds, processes=chosen.processes,
        device=["--device", chosen.device] if chosen.device else [],
    )  # fmt: skip


if __name__ == "__main__":
    main()
