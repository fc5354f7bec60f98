"""GraphedForward: the forward() of what runs an attached model's layers, which a replay may stand in for."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import nn

HASHATTN_REPLAY = "hashattn_replay"


class GraphedForward:
    """Takes the place of a module's forward(), on the instance. A copy of the module gets one of its own.

    Args:
        module: whose forward() it is; it is not kept alive.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.__signature__ = inspect.signature(type(module).forward.__get__(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replay = kwargs.pop(HASHATTN_REPLAY, None)
        if replay is not None:
            return replay()
        module = self._module()
        assert module is not None
        return type(module).forward(module, *args, **kwargs)

    def __reduce__(self) -> tuple[type[GraphedForward], tuple[nn.Module | None]]:
        return GraphedForward, (self._module(),)
