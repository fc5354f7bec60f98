"""What a check of six tokens costs on a CPU beside a plain step and a drafted one, over 8,000 keys of SmolLM2's shape.

    python benchmarks/lossless_check.py --threads 1 --json benchmarks/results/lossless_check_cpu.json

Weights and keys are random, which times do not depend on. Contenders take turns; ratios are of medians. "by SDPA" is
the same check as torch's SDPA runs it under a mask, which repeats keys for each head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hashattn.integrations.transformers.attention_arguments as arguments
from hashattn import HashAttention
from hashattn.lab.report import environment, write_json
from hashattn.lab.workload.model import cache_argument

KEYS, PROMPT, FEW = 8000, 64, arguments.FEW
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
# tokens, whether full attention, queries that the grouped way takes, rows of logits (0: all)
WAYS = {
    "plain step": (1, True, FEW, 0),
    "check of 6": (6, True, FEW, 0),
    "check of 6, logits of 1": (6, True, FEW, 1),
    "check of 6 by SDPA": (6, True, 0, 0),
    "drafted step": (1, False, FEW, 0),
}


@torch.inference_mode()
def main() -> None:
    """Measure, print, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    with HashAttention.from_preset("dashkv_fast", share=0.05).attach(model, check="dense"):
        passes, cache = model.generate.forward.passes, DynamicCache(config=model.config)
        given = {cache_argument(model): cache, "use_cache": True}
        with passes.densely("prompt"):
            model(input_ids=torch.zeros(1, PROMPT, dtype=torch.int64), logits_to_keep=1, **given)
        for layer in cache.layers:
            layer.update(*torch.randn(2, 1, 3, KEYS - PROMPT, 64))
        for turn in range(args.rounds + 1):
            for name, (tokens, full, arguments.FEW, logits) in WAYS.items():
                ids = torch.ones(1, tokens, dtype=torch.int64)
                begun = time.perf_counter()
                if full:
                    with passes.densely("check"):
                        model(input_ids=ids, logits_to_keep=logits, **given)
                else:
                    model(input_ids=ids, **given)
                if turn:
                    seconds[name].append(time.perf_counter() - begun)
                cache.crop(-tokens)
    plain = statistics.median(seconds["plain step"])
    rows = [
        {"way": name, "ms": 1e3 * statistics.median(times), "times a plain step": statistics.median(times) / plain}
        for name, times in seconds.items()
    ]
    for row in rows:
        print(f"{row['way']:26} {row['ms']:8.1f} ms {row['times a plain step']:6.2f}")
    if args.json:
        about = environment([]) | {"command": " ".join(["python", *sys.argv])}
        write_json(args.json, {**about, "keys": KEYS, "threads": args.threads, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
