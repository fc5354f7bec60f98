"""One decode step of one layer: presets against dense attention, correctness first.

    python benchmarks/decode_step.py --device cuda --out benchmarks/results/decode_step_h200.json

For CPUs there is `hashattn bench cpu`.
Microseconds are medians of interleaved calls, so that a noisy machine slows all of them alike. The baseline is the
fastest of three dense implementations in the same run. The byte floor is the time that reading the step's bytes takes
at the bandwidth of a plain sum, measured in the same run. Keys are random: cost only, no quality.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from hashattn import PRESETS, FlatHamming, HashAttention, SimHash, TopK
from hashattn import __version__ as version
from hashattn.core.files import replacing

NAMES = ("simhash_topk", "hata", "dashkv_hash_only", "dashkv")


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keys", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("HQ", "HKV", "D"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--presets", nargs="+", default=list(NAMES), choices=list(PRESETS))
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="this .* is not fitted")
    cuda = arguments.device != "cpu"
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    with torch.inference_mode():
        bandwidth = measure_bandwidth(arguments.device)
        for keys in tqdm(arguments.keys, desc="keys", unit="size"):
            rows += measure(keys, arguments, dtype, "reference" if cuda else "cpu", bandwidth)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": {"hashattn": version, "torch": torch.__version__, "python": platform.python_version()},
        "shape": dict(zip(("q_heads", "kv_heads", "head_dim"), arguments.heads, strict=True)) | {"dtype": str(dtype)},
        "read_GB_per_s": bandwidth / 1e9,
        "rows": rows,
    }
    with replacing(arguments.out) as scratch:
        scratch.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'keys':>8} {'what':<18} {'us':>9} {'x dense':>8} {'floor us':>9} {'of floor':>8}")
    for row in rows:
        print(f"{row['keys']:>8} {row['what']:<18} {row['us']:>9.0f} {row['speedup']:>8.2f} {row['floor_us']:>9.1f} "
              f"{row['us'] / row['floor_us']:>8.1f}")  # fmt: skip


def measure(keys: int, arguments: argparse.Namespace, dtype: torch.dtype, engine: str, bandwidth: float) -> list[dict]:
    """All contenders at one number of keys."""
    q_heads, kv_heads, dim = arguments.heads
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (
        torch.randn(1, heads, n, dim, generator=generator).to(arguments.device, dtype)
        for heads, n in ((q_heads, 1), (kv_heads, keys), (kv_heads, keys))
    )
    check(q, k, v, engine)
    group = q.view(1, kv_heads, q_heads // kv_heads, dim)

    def matmul() -> torch.Tensor:
        return torch.softmax(group @ k.transpose(-1, -2) * dim**-0.5, -1) @ v

    dense: dict[str, Callable[[], object]] = {
        "dense, grouped SDPA": lambda: F.scaled_dot_product_attention(group, k, v),
        "dense, SDPA with GQA": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "dense, matmul": matmul,
    }
    sparse: dict[str, Callable[[], object]] = {}
    bytes_read = dict.fromkeys(dense, 2 * kv_heads * keys * dim * dtype.itemsize)
    for name in arguments.presets:
        attn = HashAttention.from_preset(name, engine=engine)
        cache = attn.new_cache(1, kv_heads, dim)
        cache.append(k, v)
        cache.encode()
        sparse[name] = lambda attn=attn, cache=cache: attn.run(q, cache)
        sizes = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": dim, "keys": keys}
        bytes_read[name] = attn.explain(**sizes, device=arguments.device, dtype=dtype).step_bytes
    times = interleaved(dense | sparse, arguments.repeats, arguments.device)
    best = min(times[name] for name in dense)
    return [
        {"keys": keys, "what": name, "us": us, "speedup": best / us, "floor_us": bytes_read[name] / bandwidth * 1e6}
        for name, us in times.items()
    ]


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, engine: str) -> None:
    """A sparse step over all keys must be dense attention; no speed is reported otherwise."""
    n = min(2048, k.shape[2])
    k, v = k[:, :, :n].float(), v[:, :, :n].float()
    everything = HashAttention(SimHash(128), FlatHamming(), TopK(share=1.0), engine=engine)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    error = (everything(q.float(), k, v) - exact).abs().max().item()
    if not error < 1e-4:
        raise SystemExit(f"a budget of everything is off by {error}: nothing is measured")


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median microseconds of each call; all are called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append((time.perf_counter() - began) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_bandwidth(device: str) -> float:
    """Bytes per second that a sum over 1 GB reads (256 MB on the CPU)."""
    x = torch.ones((1 << 28) if device != "cpu" else (1 << 26), device=device)
    return x.numel() * 4 / (min(interleaved({"sum": lambda: x.sum()}, 7, device).values()) / 1e6)


def cpu_name() -> str:
    """The processor's model, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
