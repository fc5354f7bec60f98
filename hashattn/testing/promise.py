"""What all checks share: how a broken promise is told, and what every part promises of its name and its weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import hashattn


def promise(kept: bool | Tensor, part: object, words: str) -> None:
    """Raise AssertionError, naming the part and what it promised, unless all is kept."""
    if not (bool(kept.all()) if isinstance(kept, Tensor) else kept):
        raise AssertionError(f"{part!r} breaks the contract: {words}")


def near(a: Tensor, b: Tensor, most: float) -> bool:
    """Whether no two entries differ by more; NaN differs from everything."""
    return bool(((a.double() - b.double()).abs() <= most).all())


def check_description(part: object) -> None:
    """A part without weights is a value: eval(repr(x)) == x, and it can be a key; one with weights names its class."""
    name = type(part).__name__
    if isinstance(part, nn.Module):
        promise(name in repr(part), part, f"repr() names its class, {name}")
        return
    known = {**vars(hashattn), name: type(part)}
    try:
        again = eval(repr(part), known)
    except Exception as error:
        raise AssertionError(f"{part!r} breaks the contract: eval(repr(x)) == x, but it raises {error!r}") from error
    promise(again == part, part, f"eval(repr(x)) == x, but that is {again!r}")
    promise(hash(again) == hash(part), part, "equal parts have equal hashes: make it a frozen dataclass")


def reloaded(part: nn.Module) -> nn.Module:
    """A copy with other weights, into which those of the part were loaded again."""
    twin = copy.deepcopy(part)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(1)
    twin.load_state_dict(part.state_dict())
    return twin
