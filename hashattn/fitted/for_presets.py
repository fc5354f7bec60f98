"""A preset with encoders that were fitted to a model, in place of those that it starts with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hashattn.attention import HashAttention
from hashattn.fitted.saving import Pretrained, from_pretrained


def fitted(
    name: str, attn: HashAttention, source: str | Path | Pretrained, options: Mapping[str, Any]
) -> HashAttention:
    """The preset's composition with fitted encoders and, where they were fitted, discounts and estimates.

    Args:
        name: of the preset.
        attn: as the preset makes it.
        source: a folder, the name of encoders that come with the library, or what from_pretrained() returned.
        options: those that the user gave for the preset.

    Raises:
        ValueError: a preset that learns nothing, encoders of another kind, or an option that contradicts them.
    """
    if not isinstance(attn.encoder, nn.Module):
        raise ValueError(f"preset {name!r} has no encoder with weights, so pretrained={_named(source)} cannot serve it")
    if options.get("encoder") is not None:
        raise ValueError("encoder and pretrained both name the encoder: leave one of them out")
    loaded = source if isinstance(source, Pretrained) else from_pretrained(source)
    own, first = type(attn.encoder), loaded.encoder.layer(loaded.encoder.layers[0])
    for i in loaded.encoder.layers:
        if not isinstance(loaded.encoder.layer(i), own):
            raise ValueError(
                f"preset {name!r} takes {own.__name__}, but pretrained={_named(source)} holds "
                f"{type(loaded.encoder.layer(i)).__name__} (layer {i})"
            )
    for option in sorted({*options} & {*inspect.signature(own).parameters} - {"seed"}):
        if options[option] != getattr(first, option):
            raise ValueError(
                f"{option}={options[option]!r} contradicts pretrained={_named(source)}, which was fitted with "
                f"{option}={getattr(first, option)!r}: leave it out"
            )
    missing = [i for i in loaded.dense_layers if i not in {n % loaded.facts.layers for n in attn.dense_layers}]
    if missing and "dense_layers" in options:
        raise ValueError(
            f"dense_layers={options['dense_layers']!r} leaves out layers {missing}, for which "
            f"pretrained={_named(source)} has no encoders"
        )
    attn = attn.replace(encoder=loaded.encoder, dense_layers=(*attn.dense_layers, *missing))
    return loaded.calibration.apply(attn)


def _named(source: str | Path | Pretrained) -> str:
    return repr(source.facts.name if isinstance(source, Pretrained) else str(source))
