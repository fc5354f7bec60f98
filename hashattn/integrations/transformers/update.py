"""A composition with some of its parts, or fields of its selector, changed."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from hashattn.attention import HashAttention
from hashattn.selectors import Recent, Selector, Sink, TopK
from hashattn.selectors.base import Joined

PARTS = tuple(f.name for f in dataclasses.fields(HashAttention))
FORCED: dict[type[Selector], str] = {Sink: "sinks", Recent: "recent"}  # the names that presets use


def revised(attn: HashAttention, changes: Mapping[str, Any]) -> HashAttention:
    """The composition with `changes`: parts by their names, and fields of the selectors it is made of.

    Parts with weights are shared with the old composition, not copied.

    Raises:
        TypeError: a name that is neither; the nearest known one is named.
        ValueError: what the parts themselves refuse.
    """
    parts = {name: value for name, value in changes.items() if name in PARTS}
    fields = {name: value for name, value in changes.items() if name not in PARTS}
    selector = parts.get("selector", attn.selector)
    known = [*(field_names(selector) if isinstance(selector, Selector) else ()), *PARTS]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name!r} is no part or selector field of {attn!r}{hint}; it has {', '.join(known)}")
    if fields and isinstance(selector, Selector):
        parts["selector"] = with_fields(selector, fields)
    return attn.replace(**parts)


def field_names(selector: Selector) -> list[str]:
    """Names of the fields that can be changed, in this selector and those inside it."""
    if isinstance(selector, Joined):
        return [name for part in selector.parts for name in field_names(part)]
    if type(selector) in FORCED:
        return [FORCED[type(selector)]]
    inner = getattr(selector, "inner", None)
    names = _own(selector)
    return names + field_names(inner) if isinstance(inner, Selector) else names


def with_fields(selector: Selector, fields: Mapping[str, Any]) -> Selector:
    """The selector with those fields that it, or one inside it, has."""
    if isinstance(selector, Joined):
        return Joined(tuple(with_fields(part, fields) for part in selector.parts))
    if type(selector) in FORCED:
        name = FORCED[type(selector)]
        return type(selector)(fields[name]) if name in fields else selector  # type: ignore[call-arg]
    own = {name: fields[name] for name in _own(selector) if name in fields}
    if isinstance(selector, TopK) and len({"k", "share"} & set(own)) == 1:  # one takes the other's place
        own = {"k": None, "share": None} | own
    inner = getattr(selector, "inner", None)
    if isinstance(inner, Selector):
        own["inner"] = with_fields(inner, fields)
    if not own:
        return selector
    if isinstance(selector, nn.Module):
        return _around(selector, own["inner"])
    return dataclasses.replace(selector, **own)  # type: ignore[type-var]


def _own(selector: Selector) -> list[str]:
    fields: tuple[dataclasses.Field[Any], ...] = ()
    if dataclasses.is_dataclass(selector):
        fields = dataclasses.fields(selector)
    return [f.name for f in fields if f.name != "inner"]


def _around(wrapper: Selector, inner: Selector) -> Selector:
    """A calibration such as Consensus around another selector, with the same Parameters."""
    twin = copy.copy(wrapper)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(twin.__dict__[name])
    twin.inner = inner  # type: ignore[attr-defined]
    return twin
