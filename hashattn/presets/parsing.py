"""Presets with options, as the command line names them."""

from __future__ import annotations

import ast
import re
from typing import Any

from hashattn.fitted.saving import from_pretrained
from hashattn.presets import build


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(preset, options) of "name" or "name:option=value,option=value".

    Raises:
        ValueError: text of another form, or an unknown preset.
        TypeError: an option that the preset does not take.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in re.split(r",(?=\w+=)", rest) if rest else ():
        option, equals, value = part.partition("=")
        if not equals or not option:
            raise ValueError(f"preset {text!r}: options are written name:option=value,option=value, got {part!r}")
        try:
            options[option] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[option] = value
    if "pretrained" in options:
        options["pretrained"] = from_pretrained(options["pretrained"])  # once for all who build it
    build(name, **options)
    return name, options
