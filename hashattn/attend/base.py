"""What an attend stage is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from hashattn.core.types import Output, Selection
from hashattn.index.view import View
from hashattn.ops.decode import Estimate


class Keys(Protocol):
    """What an attend stage reads of a cache."""

    @property
    def keys(self) -> Tensor: ...  # [B, Hkv, N, D]
    @property
    def values(self) -> Tensor: ...  # [B, Hkv, N, D]
    @property
    def codes(self) -> Tensor: ...  # int64 [B, heads, N, W]
    @property
    def norms(self) -> Tensor: ...  # bfloat16 [B, Hkv, N, 1], |k - centre|
    @property
    def centre(self) -> Tensor: ...  # float32 [B, Hkv, D]
    @property
    def bits(self) -> int: ...  # length of a code
    def storage(self, what: str) -> Tensor: ...  # all that is allocated for one of the above, [B, heads, room, X]
    def selected(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...  # keys and values, and where ids are in them
    def gather(self, what: str, ids: Tensor) -> Tensor: ...  # its rows at [B, H, T, K]
    def seen(self, tokens: int, causal: bool = True) -> Tensor | None: ...  # bool [B, 1, T, N], None for all


class Attend(ABC):
    """Softmax over a selection.

    Attributes:
        needs_selection: whether it reads a selection at all.
        needs_norms: whether the cache has to keep |k - centre| (2 bytes a key).
        code: the kind of code it reads ("binary"), or None if it reads keys and values only.
        weighs_samples: whether it weighs keys that were found by collisions (Selection.collisions).
    """

    needs_selection: bool = True
    needs_norms: bool = False
    code: str | None = None
    weighs_samples: bool = False

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        cache: Keys,
        selection: Selection | None,
        scale: float,
        *,
        view: View | None = None,
        need_lse: bool = False,
        need_weights: bool = False,
    ) -> Output:
        """Attend with queries [B, Hq, T, D] to the selected keys of the cache.

        Args:
            view: what the selector saw; for stages that read codes.
            need_lse, need_weights: whether Output carries these.
        """

    @property
    def fused(self) -> bool:
        """Whether a fused decode step attends as it does: exactly, or with a fused_estimate of medium keys' logits.

        On a GPU no estimate has a residual.
        """
        return False

    @property
    def compiled(self) -> bool:
        """The same of a compiled step on a CPU, whose estimate may have a residual."""
        return self.fused

    def fused_estimate(self, cache: Keys) -> Estimate | None:
        """What a fused step estimates medium keys' logits from; None where all logits are exact."""
        return None

    def learned(self) -> tuple[object, ...]:
        """What its estimate is made of: another one is due when this has changed."""
        return ()

    def layer(self, i: int) -> Attend:
        """The stage for layer i of a model; stages that serve every layer return themselves."""
        return self


def on_host(view: View | None, selection: Selection, *given: Tensor) -> bool:
    """Whether the CPU's implementation attends, as it searched, if no gradients of what is given are wanted."""
    log_weights = selection.log_weights
    gradient = any(x.requires_grad for x in given) or (log_weights is not None and log_weights.requires_grad)
    return view is not None and view.host and not (gradient and torch.is_grad_enabled())
