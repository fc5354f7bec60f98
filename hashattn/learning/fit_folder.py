"""FitFolder: what `hashattn fit` has written so far, so that it can go on after a kill at any moment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hashattn import stored
from hashattn.encoders import Encoder
from hashattn.extras import require
from hashattn.facts import ModelFacts
from hashattn.files import replacing

RUN = "run.json"


class FitFolder:
    """A folder of fitted layers.

    run.json says what was asked for. A fitted layer is a pair: layer-05.safetensors, and layer-05.json, which is
    written last and names the other's sha256. pretrained/ holds all layers together, log.json and curves.png how they
    came about.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.pretrained = self.path / "pretrained"

    def claim(self, asked: Mapping[str, Any]) -> None:
        """Make the folder one for this run, or find that it is one already.

        Raises:
            ValueError: it holds something else, or a run that was asked for otherwise.
        """
        held = self.path / RUN
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out={str(self.path)!r} is a file: name a new or an empty folder")
        if not held.exists():
            visible = [] if not self.path.is_dir() else sorted(p.name for p in self.path.iterdir())
            visible = [name for name in visible if not name.startswith(".")]  # the others are what a kill left
            if visible:
                raise ValueError(f"out={str(self.path)!r} holds other files ({visible[0]}, ...): name a new folder")
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(held, asked)
            return
        there, here = _flat(read_json(held)), _flat(asked)
        different = [
            f"{name} is {here.get(name)!r} here and {there.get(name)!r} there"
            for name in dict.fromkeys((*here, *there))
            if here.get(name) != there.get(name)
        ]
        if different:
            raise ValueError(
                f"out={str(self.path)!r} (there) holds a fit that was asked for otherwise: {'; '.join(different)}; "
                "give the same arguments to resume it, or another folder"
            )

    def record(self, layer: int) -> dict[str, Any] | None:
        """What layer-NN.json says of a fitted layer; None if the layer is not whole."""
        weights, record = self._pair(layer)
        try:
            found: dict[str, Any] = read_json(record)
            whole = found["sha256"] == _sha256(weights)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if whole else None

    def write(self, layer: int, encoder: Encoder, record: Mapping[str, Any], note: str = "") -> Path:
        """Write a layer's weights, rounded to float16, and then its record. Returns the weights' file."""
        assert isinstance(encoder, nn.Module)
        safetensors = require("safetensors.torch", "hf", "hashattn fit")
        weights, path = self._pair(layer, note)
        with replacing(weights) as scratch:
            scratch.write_bytes(safetensors.save(stored.tensors_of(encoder)))
        write_json(path, {**record, "encoder": stored.describe(encoder), "sha256": _sha256(weights)})
        return weights

    def encoder(self, layer: int, facts: ModelFacts) -> Encoder:
        """The encoder of a fitted layer, as it was written."""
        safetensors = require("safetensors.torch", "hf", "hashattn fit")
        weights, record = self._pair(layer)
        return stored.restore(read_json(record)["encoder"], safetensors.load_file(weights), facts)

    def _pair(self, layer: int, note: str = "") -> tuple[Path, Path]:
        stem = f"layer-{layer:02d}{note}"
        return self.path / f"{stem}.safetensors", self.path / f"{stem}.json"


def read_asked(folder: FitFolder) -> dict[str, Any] | None:
    """What the folder's run was asked for; None if there is none."""
    try:
        return dict(read_json(folder.path / RUN))
    except (OSError, ValueError):
        return None


def write_json(path: Path, data: Any) -> None:
    """There whole, or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What write_json() wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def _flat(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values to tell the user; JSON's types, so that what was read equals what was written."""
    plain = json.loads(json.dumps(asked))
    recipe = plain.pop("recipe", {})
    return {**recipe, **plain}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
