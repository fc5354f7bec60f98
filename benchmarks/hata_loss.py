"""HATA's loss as its authors give it, beside the losses here, on captured queries and keys.

    hashattn capture --out captured --from 0.4 --to 0.7 --tokens 4096 --sequences 3 --retrieval 2 --layers 3 11 19 27
    python benchmarks/hata_loss.py captured --out benchmarks/results/hata_loss.json

Each layer is judged on the sequences that `hashattn fit` would hold out, and fitted to the others: the share of the
true best 5% of the keys that are among the nearest 5%, and the attention mass of these over that of the best.

HATA (Gong et al. 2025, arXiv 2506.02572, section 3.1) takes the projections x W of a KV head's queries and keys to
h = 2 sigmoid(0.1 x W) - 1, draws together what belongs together and keeps W near orthogonal: the loss is
0.01 sum(s |h_q - h_k|^2) / pairs + |sum(h_q + h_k) / (pairs bits)|^2 + 2 |W'W - I|. s falls from 20 to 1 over the best
10% of a query's keys and is -1 for the rest. W starts as normal numbers; SGD makes 15 times 20 steps of 0.1, with a
momentum of 0.9 and a weight decay of 1e-6.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattn import SymmetricHash
from hashattn import __version__ as version
from hashattn.core.files import replacing
from hashattn.encoders.fitting import fit, grouped_product
from hashattn.encoders.losses import HATA
from hashattn.encoders.sample import Sample
from hashattn.lab.learning import Shards
from hashattn.lab.learning.fit import held_out
from hashattn.lab.recall import recall_and_mass
from hashattn.lab.report import markdown

BITS, STEPS = 128, 15 * 20
Fit = Callable[[Sequence[Sample]], SymmetricHash]


def mean_key(samples: Sequence[Sample]) -> Tensor:
    """[Hkv, D]."""
    return torch.stack([s.k.mean(1) for s in samples]).mean(0)


def labels(logits: Tensor, seen: Tensor) -> Tensor:
    """s of each query and key: 20 to 1 over the best tenth, -1 for the rest, 0 for what a query does not see."""
    best = (seen.sum(-1, keepdim=True) // 10).clamp(min=1)
    rank = logits.masked_fill(~seen, -torch.inf).argsort(-1, descending=True).argsort(-1)
    falling = 20 - 19 * rank / (best - 1).clamp(min=1)
    return torch.where(rank < best, falling, -1.0) * seen


def as_published(samples: Sequence[Sample], *, centred: bool, queries: int, keys: int = 2048) -> SymmetricHash:
    """A hash for each KV head, by HATA's loss and its optimiser.

    Args:
        samples: of one layer.
        centred: whether the mean key is taken off first, which HATA does not do.
        queries, keys: drawn at each step; the authors take about 98,000 pairs.
    """
    heads, _, dim = samples[0].k.shape
    device, generator = samples[0].k.device, torch.Generator().manual_seed(0)
    mean = mean_key(samples) if centred else torch.zeros(heads, dim, device=device)
    planes = torch.randn(heads, dim, BITS, generator=generator).to(device).requires_grad_()
    optimiser = torch.optim.SGD([planes], lr=0.1, momentum=0.9, weight_decay=1e-6)
    for _ in range(STEPS):
        sample = samples[int(torch.randint(len(samples), (1,), generator=generator))]
        able = (sample.positions.cpu() >= 256).nonzero().squeeze(-1)
        rows = able[torch.randint(len(able), (queries,), generator=generator)].to(device)
        columns = torch.randperm(sample.k.shape[1], generator=generator)[:keys].sort().values.to(device)
        q, k = sample.q[:, rows], sample.k[:, columns]
        seen = columns <= sample.positions[rows].unsqueeze(-1)  # [T, N]
        pairs = seen.sum()
        h_q = torch.tanh(0.05 * (q.view(heads, -1, dim) @ planes)).view(len(q), -1, BITS)  # 2 sigmoid(0.1 x) - 1
        h_k = torch.tanh(0.05 * ((k - mean.unsqueeze(1)) @ planes))
        apart = h_q.square().sum(-1, keepdim=True) - 2 * grouped_product(h_q, h_k)
        group = len(q) // heads
        apart = apart + h_k.square().sum(-1).repeat_interleave(group, 0).unsqueeze(1)  # [Hq, T, N]
        similarity = (labels(grouped_product(q, k), seen) * apart).sum() / pairs
        counted = seen.float()
        summed = torch.einsum("tn,htb->hb", counted, h_q)
        summed = summed + torch.einsum("tn,hnb->hb", counted, h_k).repeat_interleave(group, 0)
        balance = (summed / pairs / BITS).square().sum()
        uneven = planes.transpose(-1, -2) @ planes - torch.eye(BITS, device=device)
        loss = 0.01 * similarity + balance + 2 * torch.linalg.vector_norm(uneven)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    encoder = SymmetricHash(BITS, heads=heads).build(dim, device)
    assert encoder.key_net is not None
    with torch.no_grad():
        encoder.key_net.skip.copy_(planes)
    encoder.mean = mean
    return encoder


def fitted(samples: Sequence[Sample], *, loss: str, per_head: bool, steps: int, queries: int) -> SymmetricHash:
    """By a loss of the library and its optimiser, on centred keys."""
    encoder = SymmetricHash(BITS, heads=len(samples[0].k) if per_head else None)
    fit(encoder, samples, loss=loss, steps=steps, queries=queries)
    return encoder


def random(samples: Sequence[Sample]) -> SymmetricHash:
    """Orthogonal planes on centred keys."""
    encoder = SymmetricHash(BITS).build(samples[0].k.shape[-1], samples[0].k.device)
    encoder.mean = mean_key(samples)
    return encoder


def ways(queries: int, steps: int) -> dict[str, Fit]:
    """What is compared."""
    return {
        "random planes": random,
        "HATA's loss and optimiser": lambda s: as_published(s, centred=False, queries=queries),
        "the same on centred keys": lambda s: as_published(s, centred=True, queries=queries),
        "HATA's loss as fitted here, a hash a KV head": lambda s: fitted(
            s, loss=HATA, per_head=True, steps=steps, queries=queries
        ),
        "HATA's loss as fitted here, one hash": lambda s: fitted(
            s, loss=HATA, per_head=False, steps=steps, queries=queries
        ),
        "ranking, one hash": lambda s: fitted(s, loss="ranking", per_head=False, steps=steps, queries=queries),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the layers of each model."""
    lines = [["model", "loss", "recall@5%", "mass / exact top-k's"]]
    for model, loss in dict.fromkeys((row["model"], row["loss"]) for row in rows):
        of = [row for row in rows if (row["model"], row["loss"]) == (model, loss)]
        recall, mass = (statistics.fmean(row[name] for row in of) for name in ("recall", "mass"))
        lines.append([model, loss, f"{recall:.3f}", f"{mass:.3f}"])
    return markdown(lines)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="+", help="folders of hashattn capture, one a model")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--layers", type=int, nargs="+", help="all that were captured if left out")
    parser.add_argument("--queries", type=int, default=48, help="of a step")
    parser.add_argument("--steps", type=int, default=1000, help="of the others")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen, rows = parser.parse_args(), []
    for folder in chosen.shards:
        shards = Shards.open(folder)
        kept = held_out(shards, 0.15)
        for layer in chosen.layers or shards.layers:
            samples = [
                replace(s, **{name: getattr(s, name).to(chosen.device) for name in ("q", "k", "positions")})
                for s in shards.layer(layer)
            ]
            own, judged = ([s for s in samples if (s.name in kept) is held] for held in (False, True))
            for name, make in ways(chosen.queries, chosen.steps).items():
                start = time.perf_counter()
                recall, mass = recall_and_mass(make(own), judged)
                rows.append(
                    {
                        "model": shards.facts.name, "layer": layer, "loss": name, "recall": recall, "mass": mass,
                        "seconds": time.perf_counter() - start,
                    }
                )  # fmt: skip
                print(f"{layer:>3} {recall:.3f} {mass:.3f} {rows[-1]['seconds']:5.1f} s  {name}", flush=True)
    print(f"\n{table(rows)}")
    layers = " ".join(map(str, chosen.layers or ()))
    result = {
        "command": f"python benchmarks/hata_loss.py captured --out benchmarks/results/{chosen.out.name} --queries "
        f"{chosen.queries} --steps {chosen.steps}" + (f" --layers {layers}" if chosen.layers else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "hashattn": version},
        "queries": chosen.queries,
        "steps": chosen.steps,
        "rows": rows,
    }
    with replacing(chosen.out) as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
