"""A composition with some of its parts, or settings of its selector, changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hashattn.attention import HashAttention
from hashattn.selectors import Selector
from hashattn.selectors.base import BUDGET, nearest_word

PARTS = tuple(f.name for f in dataclasses.fields(HashAttention))


def revised(attn: HashAttention, changes: Mapping[str, Any]) -> HashAttention:
    """The composition with `changes`: parts by their names, and settings of its selector (:meth:`Selector.revised`).

    Parts with weights are shared with the old composition, not copied.

    Raises:
        TypeError: a name that is neither; the nearest known one is named.
        ValueError: what the parts themselves refuse.
    """
    parts = {name: value for name, value in changes.items() if name in PARTS}
    settings = {name: value for name, value in changes.items() if name not in PARTS}
    selector = parts.get("selector", attn.selector)
    own = tuple(selector.settings()) if isinstance(selector, Selector) else ()
    for name in settings:
        if name not in own and not (name in BUDGET and isinstance(selector, Selector)):
            known = (*own, *PARTS)
            raise TypeError(
                f"{name!r} is no part and no setting of the selector{nearest_word(name, known)}; "
                f"it has {', '.join(known)}"
            )
    if settings and isinstance(selector, Selector):
        parts["selector"] = selector.revised(**settings)
    return attn.replace(**parts)
