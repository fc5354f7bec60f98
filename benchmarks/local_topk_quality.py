"""What LocalTopK keeps of what TopK keeps, on a real model and text.

    python benchmarks/local_topk_quality.py --out benchmarks/results/local_topk_quality.json

SimHash codes of the keys of SmolLM2-135M-Instruct, layers 2 to 28, and the last 64 queries of a Shakespeare text. Of
each query: the share of TopK's keys that LocalTopK keeps as well, and the attention mass on what either keeps.
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
from torch import Tensor

from hashattn import FlatHamming, HashAttention, KVCache, LocalTopK, Recent, Selector, SimHash, Sink, TopK
from hashattn import __version__ as version
from hashattn.core.files import replacing
from hashattn.integrations.transformers import Captured, capture
from hashattn.lab.demo.story import build_story
from hashattn.lab.workload.assets import SHAKESPEARE, fetch
from hashattn.lab.workload.model import load

LAYERS = range(2, 29)
PER_CHUNK = (16, 32)


def kept(attn: HashAttention, selector: Selector, c: Captured, cache: KVCache) -> Tensor:
    """bool [Hq, T, N]: the keys that the selector keeps."""
    selection = attn.replace(selector=selector).run(c.q, cache)[1]
    assert selection is not None
    keys, ids = c.k.shape[2], selection.ids[0].long()
    mask = torch.zeros(*ids.shape[:2], keys + 1, dtype=torch.bool)
    return mask.scatter_(-1, ids.where(ids >= 0, keys), True)[..., :keys]


def compare(captured: dict[int, Captured], bits: int, share: float, forced: Selector | None) -> list[dict[str, object]]:
    """Overlap with TopK and mass, means over layers, heads and queries: one row for each per_chunk."""
    keys = captured[LAYERS[0]].k.shape[2]
    k = round(share * keys / max(PER_CHUNK)) * max(PER_CHUNK)
    attn = HashAttention(SimHash(bits), FlatHamming(), TopK(k=k), engine="cpu")
    selectors = [TopK(k=k), *(LocalTopK(k, t) for t in PER_CHUNK)]
    overlap, mass = torch.zeros(len(selectors)), torch.zeros(len(selectors))
    for layer in LAYERS:
        c = captured[layer]
        cache = attn.new_cache(1, c.k.shape[1], c.k.shape[3])
        cache.append(c.k, c.v)
        weights = HashAttention.from_preset("full").run(c.q, cache, need_weights=True)[0].weights
        assert weights is not None
        found = [kept(attn, s if forced is None else forced | s, c, cache) for s in selectors]
        for i, mask in enumerate(found):
            overlap[i] += (mask & found[0]).sum() / found[0].sum() / len(LAYERS)
            mass[i] += (weights[0] * mask).sum(-1).mean() / len(LAYERS)
    return [
        {
            "keys": keys, "bits": bits, "share": share, "k": k, "forced": None if forced is None else repr(forced),
            "per_chunk": t, "overlap": overlap[i].item(), "mass": mass[i].item(), "mass_topk": mass[0].item(),
        }
        for i, t in enumerate(PER_CHUNK, 1)
    ]  # fmt: skip


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load(None)
    text = fetch(SHAKESPEARE).read_text(encoding="utf-8")
    captured = capture(model, build_story(tokenizer, text, tokens=arguments.tokens).input_ids, queries=64)
    rows = []
    for forced in (None, Sink(4) | Recent(64)):
        for bits in (64, 128):
            for share in (0.02, 0.05, 0.1):
                rows += compare(captured, bits, share, forced)
                print(*rows[-2:], sep="\n", flush=True)
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
