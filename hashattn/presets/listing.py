"""All presets in a table: what they are, what must be fitted, and which engines serve them here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hashattn.attention import HashAttention
from hashattn.engines.base import Request
from hashattn.engines.choose import serving
from hashattn.presets import build, names, options_of, preset, takes_budget

# The step that engines are asked about, of the most common shape.
_Q_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128


@dataclass(frozen=True)
class Line:
    """One preset.

    Attributes:
        name: to give to from_preset().
        method: the first line of its docstring.
        paper: "arXiv 2404.14469", or "" where none is named.
        package: that it comes from.
        fitted: "" (there is nothing to fit), "must be fitted", or "starts random".
        budget: whether it can be given a share of the keys.
        engines: that serve a decode step on this machine, the fastest last.
        options: and their defaults.
        fault: why it cannot be used; "" if it can.
    """

    name: str
    method: str = ""
    paper: str = ""
    package: str = "hashattn"
    fitted: str = ""
    budget: bool = False
    engines: tuple[str, ...] = ()
    options: dict[str, Any] | None = None
    fault: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        options = None if self.options is None else {name: _plain(value) for name, value in self.options.items()}
        return asdict(self) | {"engines": list(self.engines), "options": options}


def listing() -> list[Line]:
    """A line a preset, the library's own first; those of other packages that cannot be used say why."""
    return [_line(name, package) for name, package in names().items()]


def table(lines: Sequence[Line]) -> str:
    """The lines under a head, with the method last, as it is the longest."""
    cells = [("name", "paper", "to fit", "budget", "engines here", "method")]
    for line in lines:
        method = line.method if line.package == "hashattn" else f"{line.method} [{line.package}]"
        if line.fault:
            method = f"cannot be used: {line.fault} [{line.package}]"
        budget = "" if line.fault else "share" if line.budget else "own"
        cells.append((line.name, line.paper, line.fitted, budget, " ".join(line.engines), method))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def engines_here(attn: HashAttention) -> tuple[str, ...]:
    """The engines that serve a decode step of a common shape on this machine's devices, "dense" aside."""
    devices = [torch.device(name) for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))]
    requests = [Request(device, torch.bfloat16, 1, _Q_HEADS, _KV_HEADS, _HEAD_DIM) for device in devices]
    return serving(attn.parts, requests)


def _line(name: str, package: str) -> Line:
    try:
        about, options, attn = inspect.getdoc(preset(name)) or "", options_of(name), build(name)
        paper = re.search(r"arXiv \d{4}\.\d{4,5}", about)
        return Line(
            name,
            about.partition("\n")[0],
            paper.group() if paper else "",
            package,
            _to_fit(attn),
            takes_budget(name),
            engines_here(attn),
            options,
        )
    except Exception as error:  # what another package's code raises has no bounds, and the others are to be listed
        if package == "hashattn":
            raise
        return Line(name, package=package, fault=f"{type(error).__name__}: {error}".partition("\n")[0])


def _to_fit(attn: HashAttention) -> str:
    encoder = attn.encoder
    if encoder is None or not hasattr(encoder, "fit"):
        return ""
    try:
        encoder.check_fitted()
    except RuntimeError:
        return "must be fitted"
    return "starts random"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
