"""Tiny captured shards: two offset cones in each layer, written as hashattn capture writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from hashattn import ModelFacts
from hashattn.lab.learning import manifest, shards
from hashattn.lab.learning.manifest import Manifest, Recording
from tests.structured import cones

KEYS, QUERIES, DIM = 320, 16, 16
LAYERS = (1, 2, 4)
FACTS = ModelFacts("tiny", "llama", 5, LAYERS, 4, 2, DIM, None, 97)


def make(folder: Path, kinds: tuple[str, ...] = ("text", "text", "needle", "text"), facts: ModelFacts = FACTS) -> Path:
    """Write a folder of sequences of these kinds."""
    sequences = tuple(
        Recording(f"{i:03d}-{kind}", kind, "a.txt", KEYS, KEYS - 8 * (kind != "text"), 0, i)
        for i, kind in enumerate(kinds)
    )
    manifest.claim(Manifest(facts, facts.attention_layers, "float16", sequences, {}), folder)
    positions = torch.arange(KEYS - QUERIES, KEYS, dtype=torch.int32)
    for sequence in sequences:
        (folder / sequence.name).mkdir()
        for layer in facts.attention_layers:
            data = cones(100 * layer + sequence.seed, tokens=QUERIES, keys=KEYS, dim=facts.head_dim)
            tensors = {"q": data.q[0].half(), "k": data.k[0].half(), "positions": positions}
            shards.save(folder / sequence.name / shards.layer_filename(layer), tensors)
        ids = torch.zeros(KEYS, dtype=torch.int32)
        shards.save(folder / sequence.name / shards.TOKENS, {"ids": ids})
    return folder
