"""Shards: captured queries and keys on disk, a safetensors file for each sequence and layer."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from hashattn.encoders.sample import Sample
from hashattn.extras import require
from hashattn.facts import ModelFacts
from hashattn.files import replacing
from hashattn.learning import manifest
from hashattn.learning.manifest import Manifest, Recording

TOKENS = "tokens.safetensors"  # ids int32 [N] of a sequence; written last, so that its presence says "whole"


class Shards:
    """A captured folder: its manifest has been read, and the header of every file in it checked.

    Use Shards.open(folder). Tensors are read when a layer is asked for.

    Attributes:
        facts: of the model that the shards come from.
        layers: numbers of the captured layers.
        sequences: what was captured.
    """

    def __init__(self, folder: Path, described: Manifest) -> None:
        self.folder, self.manifest = folder, described
        self.facts, self.layers, self.sequences = described.facts, described.layers, described.sequences

    @classmethod
    def open(cls, folder: str | Path) -> Shards:
        """Open a folder that hashattn capture has filled.

        Raises:
            ValueError: no capture, or a file that is missing, cut short, or of other shapes than the model's.
        """
        shards = cls(Path(folder), manifest.read(folder))
        for sequence in shards.sequences:
            if fault := shards.fault(sequence):
                raise ValueError(f"{fault}; the same hashattn capture command makes anew what is missing or damaged")
        return shards

    def path(self, sequence: Recording, layer: int) -> Path:
        """The file of a layer."""
        return self.folder / sequence.name / layer_filename(layer)

    def fault(self, sequence: Recording) -> str | None:
        """What is wrong with the files of a sequence, judged by their headers; None if they are whole."""
        kv = [self.facts.kv_heads, sequence.keys, self.facts.head_dim]
        for layer in self.layers:
            path = self.path(sequence, layer)
            try:
                shapes = _shapes(path)
            except ValueError as error:
                return str(error)
            positions = shapes.get("positions", [0])
            wanted = {"q": [self.facts.q_heads, *positions, self.facts.head_dim], "k": kv, "positions": positions}
            if shapes != wanted:
                return f"{str(path)!r} holds {shapes}, but {wanted} was expected"
        try:
            ids = _shapes(self.folder / sequence.name / TOKENS)
        except ValueError as error:
            return str(error)
        return None if ids == {"ids": [sequence.keys]} else f"{sequence.name!r} has tokens of another length: {ids}"

    def check(self, facts: ModelFacts) -> None:
        """Raise ValueError if the shards come from another model, naming what differs."""
        if different := facts.differences(self.facts):
            raise ValueError(
                f"the shards in {str(self.folder)!r} (there) come from {self.facts.name}, not from {facts.name} "
                f"(here): {'; '.join(different)}"
            )

    def layer(self, layer: int, *, kinds: Collection[str] | None = None) -> list[Sample]:
        """All sequences of a layer, in float32.

        Args:
            layer: its number.
            kinds: sequences of these kinds only, such as ("text",); all by default.

        Raises:
            ValueError: a layer or kind that was not captured, a damaged file, or values that are not finite.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not captured: {str(self.folder)!r} holds {list(self.layers)}")
        there = {s.kind for s in self.sequences}
        if kinds is not None and not set(kinds) <= there:
            raise ValueError(f"kinds must be among {sorted(there)}, got {sorted(kinds)}")
        return [self._sample(s, layer) for s in self.sequences if kinds is None or s.kind in kinds]

    def tokens(self, sequence: Recording) -> Tensor:
        """int64 [N]: the tokens of a sequence, prefilled and decoded."""
        return load(self.folder / sequence.name / TOKENS)["ids"].long()

    def _sample(self, sequence: Recording, layer: int) -> Sample:
        path = self.path(sequence, layer)
        held = load(path)
        for name in ("q", "k"):
            if not held[name].isfinite().all():
                raise ValueError(
                    f"{str(path)!r}: {name} holds values that are not finite; remove the file, capture again"
                )
        return Sample(
            held["q"].float(),
            held["k"].float(),
            held["positions"].long(),
            sequence.tokens,
            sequence.name,
            sequence.kind,
            sequence.asked,
        )

    def __repr__(self) -> str:
        keys = sum(s.keys for s in self.sequences)
        return (
            f"Shards({str(self.folder)!r}: {self.facts.name}, {len(self.layers)} layers, "
            f"{len(self.sequences)} sequences, {keys:,} tokens)"
        )


def layer_filename(layer: int) -> str:
    """The name of a layer's file within the folder of its sequence."""
    return f"layer-{layer:02d}.safetensors"


def save(path: Path, tensors: dict[str, Tensor], **notes: object) -> None:
    """Write tensors, with notes in the header: there whole, or not at all."""
    torch_files = require("safetensors.torch", "hf", "capturing")
    with replacing(path) as scratch:
        held = {name: t.contiguous() for name, t in tensors.items()}
        # One entry: safetensors writes several in an order that differs from run to run.
        scratch.write_bytes(torch_files.save(held, metadata={"hashattn": json.dumps(notes)}))


def _shapes(path: Path) -> dict[str, list[int]]:
    """What a file holds, from its header; a file that is cut short is found by its length."""
    safetensors = require("safetensors", "hf", "reading captured shards")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} is missing") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{str(path)!r} is cut short or damaged: {error}") from error


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; ValueError if it is missing or damaged."""
    _shapes(path)
    loaded: dict[str, Tensor] = require("safetensors.torch", "hf", "reading captured shards").load_file(path)
    return loaded
