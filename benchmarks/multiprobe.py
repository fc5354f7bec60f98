"""Whether MultiProbe reads fewer bytes of codes than a flat scan at the same recall.

    python benchmarks/multiprobe.py --out benchmarks/results/multiprobe.json

Keys lie in a cone, in clusters of many sizes; queries lie in another cone and are drawn to a cluster each. Codes are
SimHash's, queries have 8 bit planes. Recall is against the k nearest keys by that same distance, over all keys. Bytes
of MultiProbe: the codes of its candidates, 4 for each bucket entry read and 8 for each bucket looked up.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hashattn import Centring, FlatHamming, HashAttention, MultiProbe, SimHash, TopK
from hashattn.lab.report import environment, write_json

BITS, PLANES, GROUP, TOKENS = 128, 8, 4, 8
TABLES = ((8, 8), (8, 12), (10, 12), (8, 16))
PROBES = (1, 4, 16, 64, 256, 512, 1024, 2048, 3072)
RECALLS = (0.5, 0.8, 0.9, 0.95, 0.99)


def structured(keys: int, dim: int, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries [1, GROUP, TOKENS, D], keys [1, 1, N, D]: the heads of a group ask for nearby things."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    centres = normal(clusters, dim)
    sizes = 1 / torch.arange(1, clusters + 1)  # as words: few are frequent
    member = torch.multinomial(sizes, keys, replacement=True, generator=g)
    k = centres[member] + 0.7 * normal(keys, dim) + 2 * normal(1, dim)
    asked = torch.multinomial(sizes, TOKENS, generator=g)
    q = centres[asked] + 0.5 * normal(TOKENS, dim) + 0.3 * normal(GROUP, TOKENS, dim) + 0.5 * normal(1, dim)
    return q[None], k[None, None]


def measure(keys: int, dim: int, clusters: int, budgets: list[int], seed: int) -> list[dict[str, object]]:
    """One row for each budget, table shape and number of probes."""
    q, k = structured(keys, dim, clusters, seed)
    attn = HashAttention(SimHash(BITS, query_bits=PLANES, centring=Centring()), FlatHamming(), TopK(k=1))
    cache = attn.new_cache(1, 1, dim, capacity=keys)
    cache.append(k, k)
    query, codes = SimHash(BITS, query_bits=PLANES).encode_query(q), cache.codes
    exact = FlatHamming().distances(cache._store, query, engine="cpu").flatten(0, 2)  # type: ignore[arg-type]
    size, rows = 8 * codes.shape[-1], []
    spans = cache.spans(TOKENS, causal=False)
    for tables, bits in tqdm(TABLES, desc=f"{clusters} clusters", file=sys.stderr):
        index = MultiProbe(tables, bits, 1)
        store = index.new_store(keys)
        store.add(codes)
        for probes in (p for p in PROBES if p <= 1 << min(bits, 12)):
            query_of, columns, entries = MultiProbe(tables, bits, probes).candidates(store, query, spans)
            found = torch.zeros(exact.shape, dtype=torch.bool)
            found[query_of, columns] = True
            alone = len(columns) / len(exact) * size + entries / len(exact) * 4 + tables * probes * 8
            union = found.view(GROUP, TOKENS, keys).any(0).sum().item() / TOKENS * size
            group = union + GROUP * (entries / len(exact) * 4 + tables * probes * 8)
            for budget in budgets:
                cut = exact.kthvalue(budget, dim=-1, keepdim=True).values
                near = exact <= cut
                rows.append(
                    {
                        "keys": keys, "clusters": clusters, "k": budget, "tables": tables, "bits": bits,
                        "probes": probes, "recall": ((found & near).sum() / near.sum()).item(),
                        "candidates": len(columns) / len(exact), "bytes": alone, "of_flat": alone / (keys * size),
                        "of_flat_for_a_group": group / (keys * size),
                    }
                )  # fmt: skip
            if alone > keys * size:  # more probes read more
                break
    return rows


def summary(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """For each data set, budget and recall the setting that reads least."""
    best = []
    for clusters, budget in sorted({(r["clusters"], r["k"]) for r in rows}):  # type: ignore[type-var]
        for recall in RECALLS:
            able = [r for r in rows if (r["clusters"], r["k"]) == (clusters, budget) and r["recall"] >= recall]  # type: ignore[operator]
            if able:
                least = min(able, key=lambda r: r["of_flat"])  # type: ignore[arg-type, return-value]
                best.append({"at_recall": recall, **least})
    return best


def main() -> None:
    """Measure, print the summary and write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, nargs="+", default=[64, 1024, 16384])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [r for c in args.clusters for r in measure(args.keys, args.dim, c, args.budgets, args.seed)]
    best = summary(rows)
    for r in best:
        print(
            f"clusters {r['clusters']:>6} k {r['k']:>5} recall >= {r['at_recall']}: L {r['tables']} K {r['bits']} "
            f"P {r['probes']}, recall {r['recall']:.3f}, reads {r['of_flat']:.2f} of a flat scan, "
            f"{r['of_flat_for_a_group']:.2f} for a group of {GROUP}"
        )
    about = environment([]) | {"command": " ".join(["python", *sys.argv])}
    write_json(args.out, {**about, "bits": BITS, "query_bits": PLANES, "seed": args.seed, "best": best, "rows": rows})


if __name__ == "__main__":
    main()
