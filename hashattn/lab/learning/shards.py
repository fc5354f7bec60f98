"""Shards: captured queries and keys on disk, a safetensors file for each sequence and layer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from hashattn.core import tensor_files
from hashattn.core.model_facts import ModelFacts
from hashattn.core.tensor_files import Stored
from hashattn.encoders.sample import Sample
from hashattn.lab.learning import manifest
from hashattn.lab.learning.manifest import Manifest, Recording

_NAMES = {"float16": "F16", "bfloat16": "BF16"}
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
        facts, dtype = self.facts, _NAMES[self.manifest.dtype]
        try:
            for layer in self.layers:
                path = self.path(sequence, layer)
                found = tensor_files.header(path)
                shape = found["positions"].shape if "positions" in found else ()
                queries = shape[0] if len(shape) == 1 and 0 < shape[0] <= sequence.keys else 1
                wanted = {
                    "q": Stored(dtype, (facts.q_heads, queries, facts.head_dim)),
                    "k": Stored(dtype, (facts.kv_heads, sequence.keys, facts.head_dim)),
                    "positions": Stored("I32", (queries,)),
                }
                if found != wanted:
                    return f"{str(path)!r} holds {_said(found)}, but {_said(wanted)} was expected"
            path = self.folder / sequence.name / TOKENS
            if (found := tensor_files.header(path)) != (wanted := {"ids": Stored("I32", (sequence.keys,))}):
                return f"{str(path)!r} holds {_said(found)}, but {_said(wanted)} was expected"
        except ValueError as error:
            return str(error)
        return None

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
        return tensor_files.read(self.folder / sequence.name / TOKENS)["ids"].long()

    def _sample(self, sequence: Recording, layer: int) -> Sample:
        path = self.path(sequence, layer)
        held = tensor_files.read(path)
        for name in ("q", "k"):
            if not held[name].isfinite().all():
                raise ValueError(
                    f"{str(path)!r}: {name} holds values that are not finite; remove the file, capture again"
                )
        positions = held["positions"]
        if not (positions[0] >= 0 and positions[-1] < sequence.keys and (positions.diff() > 0).all()):
            raise ValueError(
                f"{str(path)!r}: positions are no ascending columns of {sequence.keys} keys; remove the file"
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
    """Write a file of a sequence, with notes in its header: there whole, or not at all."""
    tensor_files.write(path, tensors, hashattn=notes)


def _said(tensors: dict[str, Stored]) -> str:
    return ", ".join(f"{name}: {tensor}" for name, tensor in sorted(tensors.items())) or "nothing"
