"""Saving and loading: fitted encoders of a model in a folder of safetensors and JSON."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattn.attend.mixed import CodeResidual, MixedPrecision
from hashattn.attention import HashAttention
from hashattn.core import tensor_files
from hashattn.core.files import locked, replacing
from hashattn.core.files import sha256 as _sha256
from hashattn.core.json_files import is_number, parse_json, read_json, whole_number, write_json
from hashattn.core.model_facts import ModelFacts
from hashattn.core.version import __version__
from hashattn.encoders import Encoder, PerLayer
from hashattn.fitted import encoder_weights
from hashattn.fitted.calibration import Calibration

FORMAT_VERSION = 1
CONFIG, WEIGHTS, LOCK = "config.json", "weights.safetensors", ".lock"
LARGEST = 4 << 20  # bytes of config.json
_FARTHEST, _WIDEST = 1 << 20, 1 << 16  # that a discount and the width of a residual may be
BIT_ORDER = "bit i of a code is bit i % 64 of int64 word i // 64"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """Fitted encoders of a model, and what was fitted beside them.

    Attributes:
        encoder: the encoder of each served layer; encoder.facts is the model that attach() asks for.
        facts: the model that they were fitted to.
        calibration: discounts and estimates, where they were fitted.
        fitted_on: how they were fitted and what they reached, as it was given to save_pretrained().
    """

    encoder: PerLayer
    facts: ModelFacts
    calibration: Calibration = field(default_factory=Calibration)
    fitted_on: Any = None

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers of full attention that have no encoder."""
        return tuple(i for i in self.facts.attention_layers if i not in self.encoder.layers)


def save_pretrained(
    part: HashAttention | PerLayer,
    folder: str | Path,
    *,
    facts: ModelFacts | None = None,
    calibration: Calibration | None = None,
    fitted_on: Any = None,
    dtype: str = "float16",
) -> Path:
    """Write fitted encoders to a folder: config.json and weights.safetensors. Other files in it stay as they are.

    Whenever it is stopped, the folder holds what it held before, or all of what is new. Weights are rounded to `dtype`;
    encoder_weights.round_weights() first makes the encoder at hand the one that is loaded.

    Args:
        part: a PerLayer, or a composition with one, whose calibration is then saved too.
        folder: new or empty, or one that save_pretrained() wrote to; a link to such a folder is followed.
        facts: of the model, see facts_of(); those that the encoder carries by default.
        calibration: discounts and estimates to save.
        fitted_on: anything that JSON takes: texts, losses, what was reached.
        dtype: "float16" or "float32".

    Returns:
        the folder.

    Raises:
        ValueError: encoders that are not fitted or do not suit the model, a folder that holds something else, or
            that another process saves in.
        TypeError: no PerLayer.
        OSError: the folder cannot be written.
    """
    encoder = part.encoder if isinstance(part, HashAttention) else part
    if not isinstance(encoder, PerLayer):
        raise TypeError(
            f"one encoder a layer is saved: PerLayer({{layer: encoder, ...}}), got {type(encoder).__name__}"
        )
    if calibration is None:
        calibration = Calibration.of(part) if isinstance(part, HashAttention) else Calibration()
    facts = facts or encoder.facts
    if facts is None:
        raise ValueError("facts are missing: give facts=facts_of(model), so that other models can be refused")
    _check_layers(encoder.layers, calibration, facts)
    described: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for i in encoder.layers:
        one = encoder.layer(i)
        one.check_model(facts.q_heads, facts.kv_heads, facts.head_dim)
        described[str(i)] = encoder_weights.describe(one)
        tensors |= _prefixed(f"encoders.{i}.", encoder_weights.tensors_of(encoder.encoders[str(i)], dtype))
    for i, stage in calibration.mixed.items():
        tensors |= _prefixed(f"mixed.{i}.", encoder_weights.tensors_of(stage, dtype))
    folder = Path(folder)
    check_target(folder)
    data = tensor_files.packed(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "model": facts.as_json(),
        "bits": encoder.bits,
        "bit_order": BIT_ORDER,
        "post_rope": True,
        "encoders": described,
        "dense_layers": list(Pretrained(encoder, facts).dense_layers),
        "calibration": {
            "consensus": calibration.consensus,
            "momentum": calibration.momentum,
            "mixed": {str(i): {"hidden": stage.hidden} for i, stage in calibration.mixed.items()},
        },
        "fitted_on": fitted_on,
        "dtype": dtype,
        "weights_sha256": sha256,
    }
    parse_json(json.dumps(config, allow_nan=False))  # what could not be read again is not written
    ModelFacts.from_json(config["model"])
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"saving encoders in {str(folder)!r}"):
        check_target(folder)  # as it is now
        with replacing(_staged(folder, sha256)) as scratch:
            scratch.write_bytes(data)
        write_json(folder / CONFIG, config)
        os.replace(_staged(folder, sha256), folder / WEIGHTS)
        for left in folder.glob(_staged(folder, "*").name):  # by a save that was killed
            left.unlink(missing_ok=True)
    return folder


def from_pretrained(source: str | Path) -> Pretrained:
    """Read what save_pretrained() wrote. Everything is checked; no code comes from the folder.

    Memory is taken for weights only after the file's header has been found to hold what config.json describes.

    Args:
        source: a folder, or the name of encoders that come with the library, see :func:`shipped`.

    Raises:
        ValueError: no such folder or name, another format, or a damaged file, which is named.
        ImportError: encoders of an installed package's class that cannot be imported.
    """
    folder, same = _folder(source), 0
    while True:
        config = _config(folder)
        path = _weights(folder, config)
        try:
            return _read(config, path)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(folder / CONFIG)!r} lacks a field, or it is of another type: {error}") from error
        except ValueError as error:
            again = _config(folder)
            same += (again, _weights(folder, again)) == (config, path)  # else it was saved anew in between,
            if same == 3:  # or twice, back and forth
                raise ValueError(f"{str(folder / CONFIG)!r} cannot be used: {error}") from error


def shipped() -> dict[str, Path]:
    """Encoders that come with the library: name -> folder."""
    home = Path(str(files("hashattn.fitted") / "weights"))
    return {path.parent.name: path.parent for path in sorted(home.glob(f"*/{CONFIG}"))}


def _read(config: Mapping[str, Any], path: Path) -> Pretrained:
    for name, wanted in (("bit_order", BIT_ORDER), ("post_rope", True)):
        if config[name] != wanted or type(config[name]) is not type(wanted):
            raise ValueError(f"{name} is {config[name]!r:.100}, this version reads {wanted!r}")
    facts, noted, sha256 = ModelFacts.from_json(config["model"]), config["calibration"], config["weights_sha256"]
    if not isinstance(sha256, str):
        raise ValueError(f"weights_sha256 must be a string, got {sha256!r:.100}")
    weights = _Loading(path, sha256)
    encoders: dict[int, Any] = {}
    for i, description in _by_layer("encoders", config["encoders"], facts):
        try:
            encoders[i] = encoder_weights.restore(description, weights.part(f"encoders.{i}."), facts)
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from error
    mixed = {
        i: _mixed(f"layer {i}", arguments, weights.part(f"mixed.{i}."), encoders.get(i))
        for i, arguments in _by_layer("calibration.mixed", noted["mixed"], facts)
    }
    if weights.left:
        names = ", ".join(sorted(weights.left))
        raise ValueError(f"{WEIGHTS} holds weights that {CONFIG} does not name: {names:.1000}")
    for name in ("consensus", "momentum"):
        if not (noted[name] is None or (is_number(noted[name]) and 0 <= noted[name] <= _FARTHEST)):
            raise ValueError(
                f"calibration: {name} must be a number from 0 to {_FARTHEST} or null, got {noted[name]!r:.100}"
            )
    calibration = Calibration(noted["consensus"], noted["momentum"], mixed)
    encoder = PerLayer(encoders, facts)
    _check_layers(encoder.layers, calibration, facts)
    if encoder.bits != config["bits"] or isinstance(config["bits"], bool):
        raise ValueError(f"bits is {config['bits']!r:.100}, but the encoders make codes of {encoder.bits}")
    return Pretrained(encoder, facts, calibration, config["fitted_on"])


class _Loading:
    """A file of weights: its header at once, the rest when the first part asks for it."""

    def __init__(self, path: Path, sha256: str) -> None:
        self.path, self.sha256 = path, sha256
        try:
            self.left = tensor_files.header(path)
        except ValueError as error:
            raise ValueError(f"{error}; {CONFIG} names sha256 {sha256}") from error
        self.tensors: dict[str, Tensor] = {}

    def part(self, prefix: str) -> encoder_weights.Weights:
        """The tensors of a prefix, which are then no longer left."""
        said = {name: self.left.pop(name) for name in [*self.left] if name.startswith(prefix)}

        def read() -> dict[str, Tensor]:
            if not self.tensors and (found := _sha256(self.path)) != self.sha256:
                raise ValueError(f"{self.path.name} is damaged: its sha256 is {found}, {CONFIG} names {self.sha256}")
            self.tensors = self.tensors or tensor_files.read(self.path)
            return {name.removeprefix(prefix): self.tensors[name] for name in said}

        return encoder_weights.Weights({name.removeprefix(prefix): tensor for name, tensor in said.items()}, read)


def _by_layer(field_name: str, described: Any, facts: ModelFacts) -> list[tuple[int, Any]]:
    """What is given for each layer by its number as JSON has it, a string."""
    if not isinstance(described, Mapping):
        raise ValueError(f"{field_name} must be an object, got {described!r:.100}")
    numbers = {str(i): i for i in range(facts.layers)}
    for i in described:
        if i not in numbers:
            raise ValueError(f"{field_name} must be of layers 0 to {facts.layers - 1}, got {i!r:.100}")
    return [(numbers[i], description) for i, description in described.items()]


def _mixed(where: str, arguments: Any, weights: encoder_weights.Weights, encoder: Encoder | None) -> MixedPrecision:
    if not (isinstance(arguments, Mapping) and whole_number(arguments.get("hidden"), 0, _WIDEST)):
        raise ValueError(f"{where}: MixedPrecision needs hidden, a number from 0 to {_WIDEST}, got {arguments!r:.100}")
    try:
        with torch.device("meta"):
            stage = MixedPrecision(hidden=arguments["hidden"])
            if encoder is not None and stage.hidden and any(name.startswith("residual.") for name in weights.said):
                stage.residual = CodeResidual(encoder.bits, stage.hidden)
        encoder_weights.fill(stage, weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: no MixedPrecision can be made of what is stored: {error}") from error
    return stage


def _check_layers(layers: tuple[int, ...], calibration: Calibration, facts: ModelFacts) -> None:
    if not set(layers) <= set(facts.attention_layers):
        raise ValueError(
            f"encoders are of layers {list(layers)}, but {facts.name} has full attention in "
            f"{list(facts.attention_layers)}"
        )
    if calibration.mixed and set(calibration.mixed) != set(layers):
        raise ValueError(
            f"calibration.mixed must be of the layers with encoders, {list(layers)}, got {sorted(calibration.mixed)}"
        )


def _folder(source: str | Path) -> Path:
    known = shipped()
    if isinstance(source, str) and source in known:
        return known[source]
    folder = Path(source)
    if (folder / CONFIG).is_file():
        return folder
    near = difflib.get_close_matches(str(source), list(known), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if folder.is_dir():
        inside = next(folder.glob(f"*/{CONFIG}"), None)
        hint = f": it has no {CONFIG}" + (f"; {str(inside.parent)!r} has" if inside else "")
    raise ValueError(
        f"{str(source)!r} is no folder of fitted encoders{hint}; those that come with the library are "
        f"{', '.join(known) or 'none'}"
    )


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        config = read_json(path, LARGEST)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    version = config.get("format_version") if isinstance(config, Mapping) else None
    if version != FORMAT_VERSION or type(version) is not int:
        raise ValueError(f"{str(path)!r}: format_version is {version!r:.100}, this version reads {FORMAT_VERSION}")
    return config


def check_target(folder: Path) -> None:
    """Raise ValueError for a folder that encoders cannot be saved in: hidden files and our own are no hindrance."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is {'a file' if folder.exists() else 'a broken link'}: name a folder")
    visible = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    if not visible:
        return
    try:
        held = read_json(folder / CONFIG, LARGEST)
    except (OSError, ValueError):
        held = None
    if not isinstance(held, Mapping) or not {"format_version", "weights_sha256"} <= set(held):
        raise ValueError(
            f"folder={str(folder)!r} holds something else than fitted encoders ({visible[0]}, ...): name a new one"
        )


def _weights(folder: Path, config: Mapping[str, Any]) -> Path:
    """The file that config.json speaks of."""
    sha256 = config.get("weights_sha256")
    if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) and _staged(folder, sha256).is_file():
        return _staged(folder, sha256)  # a save was stopped, or is not done yet
    return folder / WEIGHTS


def _staged(folder: Path, sha256: str) -> Path:
    """Where weights lie until config.json names them: whichever moment a save is stopped at, old or new are read."""
    return folder / f".weights-{sha256}.safetensors"


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
