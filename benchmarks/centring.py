"""What is best subtracted from keys before their signs are taken, on a real model and text.

    python benchmarks/centring.py --out benchmarks/results/centring.json

Attention mass kept by the 5% of the keys that 128-bit codes find nearest (4 sinks and 64 recent ones among them), mean
over layers 2 to 28 of SmolLM2-135M-Instruct, for the last 64 queries of a Shakespeare text.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import torch
import transformers

from hashattn import Centring, FlatHamming, HashAttention, Recent, SimHash, Sink, TopK
from hashattn import __version__ as version
from hashattn.core.files import replacing
from hashattn.integrations.transformers import capture
from hashattn.lab.demo.story import build_story
from hashattn.lab.workload.assets import SHAKESPEARE, fetch
from hashattn.lab.workload.model import load


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8000])
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load(None)
    text, rows = fetch(SHAKESPEARE).read_text(encoding="utf-8"), []
    for tokens in arguments.tokens:
        captured = capture(model, build_story(tokenizer, text, tokens=tokens).input_ids, queries=64)
        ways: dict[str, Centring | None] = {"nothing": None}
        for strength in (0.25, 0.5, 0.75, 1.0):
            ways[f"{strength:g} of the mean of the first 256"] = Centring(strength)
            ways[f"{strength:g} of the mean of all"] = Centring(strength, keys=tokens - 100)
        for name, centring in ways.items():
            attn = HashAttention(
                SimHash(128, centring=centring), FlatHamming(), Sink(4) | Recent(64) | TopK(share=0.05), engine="cpu"
            )
            kept = []
            for layer in range(2, 29):
                c = captured[layer]
                cache = attn.new_cache(1, c.k.shape[1], c.k.shape[3])
                cache.append(c.k, c.v)
                _, selection = attn.run(c.q, cache)
                weights = HashAttention.from_preset("full").run(c.q, cache, need_weights=True)[0].weights
                assert selection is not None and weights is not None
                found = weights.gather(-1, selection.ids.clamp(min=0).long()) * (selection.ids >= 0)
                kept.append(found.sum(-1).mean().item())
            rows.append({"tokens": tokens, "subtracted": name, "mass": sum(kept) / len(kept)})
            print(f"{tokens:>6} {name:<36} {rows[-1]['mass']:.4f}", flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": "CPU, float32",
        "versions": {
            "hashattn": version, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }  # fmt: skip
    with replacing(arguments.out) as scratch:
        scratch.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
