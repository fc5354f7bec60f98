"""FitFolder: what `hashattn fit` has written so far, so that it can go on after a kill at any moment."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hashattn.core import tensor_files
from hashattn.core.files import locked, sha256
from hashattn.core.json_files import is_number, read_json, write_json
from hashattn.core.model_facts import ModelFacts
from hashattn.encoders import Encoder
from hashattn.fitted import encoder_weights

RUN = "run.json"
_FIGURES = ("recall", "mass", "seconds", "best_step")  # of a layer's record


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
        if os.path.lexists(self.path) and not self.path.is_dir():
            kind = "a file" if self.path.exists() else "a broken link"
            raise ValueError(f"out={str(self.path)!r} is {kind}: name a new or an empty folder")
        if not held.exists():
            visible = [] if not self.path.is_dir() else sorted(p.name for p in self.path.iterdir())
            visible = [name for name in visible if not name.startswith(".")]  # the others are what a kill left
            if visible:
                raise ValueError(f"out={str(self.path)!r} holds other files ({visible[0]}, ...): name a new folder")
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(held, asked)
            return
        described = read_json(held)
        if not isinstance(described, dict):
            raise ValueError(f"{str(held)!r} describes no fit: an object was expected")
        there, here = _flat(described), _flat(asked)
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

    @contextlib.contextmanager
    def fitting(self, layers: Iterable[int]) -> Iterator[None]:
        """Hold these layers, so that no other process fits them meanwhile.

        Raises:
            ValueError: another one does; the message says who.
        """
        with contextlib.ExitStack() as held:
            for i in layers:
                held.enter_context(
                    locked(self.path / f".layer-{i:02d}.lock", f"fitting layer {i} in {str(self.path)!r}")
                )
            yield

    def record(self, layer: int) -> dict[str, Any] | None:
        """What layer-NN.json says of a fitted layer; None if the layer is not whole."""
        weights, record = self._pair(layer)
        try:
            found: dict[str, Any] = read_json(record)
            whole = found["sha256"] == sha256(weights) and found["layer"] == layer
            whole = whole and isinstance(found["looks"], list) and all(is_number(found[name]) for name in _FIGURES)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if whole else None

    def write(self, layer: int, encoder: Encoder, record: Mapping[str, Any], note: str = "") -> Path:
        """Write a layer's weights, rounded to float16, and then its record. Returns the weights' file."""
        assert isinstance(encoder, nn.Module)
        weights, path = self._pair(layer, note)
        tensor_files.write(weights, encoder_weights.tensors_of(encoder))
        write_json(path, {**record, "encoder": encoder_weights.describe(encoder), "sha256": sha256(weights)})
        return weights

    def encoder(self, layer: int, facts: ModelFacts) -> Encoder:
        """The encoder of a fitted layer, as it was written.

        Raises:
            ValueError: one of its two files is damaged.
        """
        weights, record = self._pair(layer)
        try:
            found = read_json(record)
            described = found["encoder"]
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"{str(record)!r} describes no fitted layer: {error}") from error
        held = encoder_weights.Weights(tensor_files.header(weights), lambda: tensor_files.read(weights))
        return encoder_weights.restore(described, held, facts)

    def _pair(self, layer: int, note: str = "") -> tuple[Path, Path]:
        stem = f"layer-{layer:02d}{note}"
        return self.path / f"{stem}.safetensors", self.path / f"{stem}.json"


def read_asked(folder: FitFolder) -> dict[str, Any] | None:
    """What the folder's run was asked for; None if there is none."""
    try:
        return dict(read_json(folder.path / RUN))
    except (OSError, ValueError):
        return None


def _flat(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values to tell the user; JSON's types, so that what was read equals what was written."""
    plain = json.loads(json.dumps(asked))
    recipe = plain.pop("recipe", {})
    return {**(recipe if isinstance(recipe, dict) else {"recipe": recipe}), **plain}
