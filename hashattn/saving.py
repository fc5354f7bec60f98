"""Saving and loading: fitted encoders of a model in a folder of safetensors and JSON."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattn import stored
from hashattn.attend.mixed import CodeResidual, MixedPrecision
from hashattn.attention import HashAttention
from hashattn.calibration import Calibration
from hashattn.encoders import PerLayer
from hashattn.extras import require
from hashattn.facts import ModelFacts
from hashattn.files import replacing_folder

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
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
    part: HashAttention | PerLayer, folder: str | Path, *, facts: ModelFacts | None = None,
    calibration: Calibration | None = None, fitted_on: Any = None, dtype: str = "float16",
) -> Path:  # fmt: skip
    """Write fitted encoders to a folder: config.json and weights.safetensors, both or none.

    Weights are rounded to `dtype`; stored.round_weights() first makes the encoder at hand the one that is loaded.

    Args:
        part: a PerLayer, or a composition with one, whose calibration is then saved too.
        folder: new, or a folder that save_pretrained() wrote, which is replaced.
        facts: of the model, see facts_of(); those that the encoder carries by default.
        calibration: discounts and estimates to save.
        fitted_on: anything that JSON takes: texts, losses, what was reached.
        dtype: "float16" or "float32".

    Returns:
        the folder.

    Raises:
        ValueError: encoders that are not fitted or do not suit the model, a folder that holds something else.
        TypeError: no PerLayer.
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
        described[str(i)] = stored.describe(one)
        tensors |= _prefixed(f"encoders.{i}.", stored.tensors_of(encoder.encoders[str(i)], dtype))
    for i, stage in calibration.mixed.items():
        tensors |= _prefixed(f"mixed.{i}.", stored.tensors_of(stage, dtype))
    folder = Path(folder)
    _check_target(folder)
    safetensors = require("safetensors.torch", "hf", "save_pretrained")
    with replacing_folder(folder) as scratch:
        (scratch / WEIGHTS).write_bytes(safetensors.save(tensors))
        config = {
            "format_version": FORMAT_VERSION, "library_version": _version(), "model": facts.as_json(),
            "bits": encoder.bits, "bit_order": BIT_ORDER, "post_rope": True, "encoders": described,
            "dense_layers": list(Pretrained(encoder, facts).dense_layers),
            "calibration": {
                "consensus": calibration.consensus, "momentum": calibration.momentum,
                "mixed": {str(i): {"hidden": stage.hidden} for i, stage in calibration.mixed.items()},
            },
            "fitted_on": fitted_on, "dtype": dtype, "weights_sha256": _sha256(scratch / WEIGHTS),
        }  # fmt: skip
        (scratch / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return folder


def from_pretrained(source: str | Path) -> Pretrained:
    """Read what save_pretrained() wrote. Everything is checked; no code comes from the folder.

    Args:
        source: a folder, or the name of encoders that come with the library, see :func:`shipped`.

    Raises:
        ValueError: no such folder or name, another format, or a damaged file, which is named.
    """
    folder = _folder(source)
    config = _config(folder)
    try:
        return _read(config, _tensors(folder / WEIGHTS, config["weights_sha256"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(folder / CONFIG)!r} lacks a field, or it is of another type: {error}") from error
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} cannot be used: {error}") from error


def shipped() -> dict[str, Path]:
    """Encoders that come with the library: name -> folder."""
    home = Path(str(files("hashattn") / "weights"))
    return {path.parent.name: path.parent for path in sorted(home.glob(f"*/{CONFIG}"))}


def _read(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Pretrained:
    for name, wanted in (("bit_order", BIT_ORDER), ("post_rope", True)):
        if config[name] != wanted:
            raise ValueError(f"{name} is {config[name]!r}, this version reads {wanted!r}")
    facts, noted = ModelFacts.from_json(config["model"]), config["calibration"]
    encoders: dict[int, Any] = {}
    for i, description in config["encoders"].items():
        try:
            encoders[int(i)] = stored.restore(description, _taken(f"encoders.{i}.", tensors), facts)
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from error
    mixed = {
        int(i): _mixed(f"layer {i}", arguments, _taken(f"mixed.{i}.", tensors))
        for i, arguments in noted["mixed"].items()
    }
    if tensors:
        raise ValueError(f"{WEIGHTS} holds weights that {CONFIG} does not name: {', '.join(sorted(tensors))}")
    for name in ("consensus", "momentum"):
        if not (noted[name] is None or (isinstance(noted[name], int | float) and noted[name] >= 0)):
            raise ValueError(f"calibration: {name} must be a number of at least 0 or null, got {noted[name]!r}")
    calibration = Calibration(noted["consensus"], noted["momentum"], mixed)
    encoder = PerLayer(encoders, facts)
    _check_layers(encoder.layers, calibration, facts)
    if encoder.bits != config["bits"]:
        raise ValueError(f"bits is {config['bits']!r}, but the encoders make codes of {encoder.bits}")
    return Pretrained(encoder, facts, calibration, config["fitted_on"])


def _mixed(where: str, arguments: Mapping[str, Any], tensors: dict[str, Tensor]) -> MixedPrecision:
    try:
        stage = MixedPrecision(hidden=arguments["hidden"])
        if "residual.query.weight" in tensors:
            with torch.random.fork_rng(devices=[]):  # its own start is overwritten at once
                stage.residual = CodeResidual(tensors["residual.query.weight"].shape[1], stage.hidden)
        stored.fill(stage, tensors)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
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
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    version = config.get("format_version") if isinstance(config, Mapping) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{str(path)!r}: format_version is {version!r}, this version reads {FORMAT_VERSION}")
    return config


def _tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    safetensors = require("safetensors", "hf", "from_pretrained")
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if (found := _sha256(path)) != sha256:
        raise ValueError(f"{path.name} is damaged or cut short: its sha256 is {found}, {CONFIG} names {sha256}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file: {error}") from error


def _check_target(folder: Path) -> None:
    """Refuse to replace what is no folder of this kind."""
    if folder.is_dir() and any(folder.iterdir()) and not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
        raise ValueError(f"folder={str(folder)!r} holds something else than fitted encoders: name a new one")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file: name a new folder")


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of a prefix out of what is left."""
    return {name[len(prefix) :]: tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version() -> str:
    from hashattn import __version__  # the package imports this module

    return __version__
