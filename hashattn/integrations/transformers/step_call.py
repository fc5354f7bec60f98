"""StepCall: a call of what runs the layers, told apart into what changes from step to step and what a graph fixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.integrations.attached.mask import Rows, read_mask, read_padding

TOKENS, POSITIONS = ("input_ids", "inputs_embeds", "hidden_states"), "position_ids"
CHANGING = (*TOKENS, POSITIONS, "cache_position")  # tensors of the same shape in every step
WIDER = ("output_attentions", "output_hidden_states", "output_router_logits")  # outputs that a graph does not keep
PLAIN = (bool, int, float, str)


@dataclass(frozen=True, eq=False)
class StepCall:
    """One call.

    Attributes:
        cache_name: of its cache among the arguments.
        mask: the attention mask, or those by type of layer; None without one.
        changing: tensors that the next step gives anew, by name.
        fixed: the other arguments.
        why_dense: why none of its layers searches; None if they do.
    """

    cache: Any
    cache_name: str
    mask: Any
    changing: dict[str, Tensor]
    fixed: dict[str, Any]
    why_dense: str | None = None

    @classmethod
    def of(
        cls, places: Mapping[str, int], caches: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepCall:
        """Of a module's arguments, whose places are given.

        Args:
            caches: what the cache may be called.
        """
        named = {**dict(zip(places, args, strict=False)), **kwargs}
        given = {name: value for name, value in named.items() if value is not None}
        mask = given.pop("attention_mask", None)
        name = next((name for name in caches if name in given), "")
        cache = given.pop(name, None)
        changing = {name: given.pop(name) for name in CHANGING if isinstance(given.get(name), Tensor)}
        return cls(cache, name, mask, changing, given)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(rows, tokens); None where it is not known."""
        tokens = next((self.changing[name] for name in TOKENS if name in self.changing), None)
        return None if tokens is None or tokens.ndim < 2 else (tokens.shape[0], tokens.shape[1])

    @property
    def key(self) -> tuple[Any, ...]:
        """What calls that one graph serves have in common."""
        tensors = [(name, x.shape, x.dtype, x.device) for name, x in self.changing.items()]
        masks = tuple(self.mask) if isinstance(self.mask, Mapping) else None
        return self.cache_name, masks, tuple(tensors), tuple(self.fixed.items()), self.why_dense is not None

    def why_not(self, config: Any) -> str | None:
        """Why a graph cannot serve it, as far as its arguments say."""
        for name in WIDER:
            if self.fixed.get(name, getattr(config, name, False)):
                return f"{name}=True"
        tensors = [name for name, value in self.fixed.items() if not isinstance(value, PLAIN)]
        if tensors:
            return f"it is given {', '.join(tensors)}, which is not known here"
        if isinstance(self.mask, Mapping) and set(self.mask) != {"full_attention"}:
            return f"it is given masks for {', '.join(map(str, self.mask))}"
        if torch.is_grad_enabled():
            return "gradients are enabled: call it under torch.no_grad()"
        if torch.is_autocast_enabled(next(iter(self.changing.values())).device.type):
            return "autocast is on"
        return None

    @property
    def own_mask(self) -> Any:
        """The mask itself."""
        return self.mask.get("full_attention") if isinstance(self.mask, Mapping) else self.mask

    def rows(self, keys: int) -> Rows:
        """What its mask says of the rows, of so many columns; waits for the device."""
        assert self.shape is not None
        (batch, tokens), mask = self.shape, self.own_mask
        if mask is None:
            return [0] * batch, None
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            return [0] * batch, f"the attention mask is a {type(mask).__name__}"
        return read_padding(mask, batch, keys) if mask.ndim == 2 else read_mask(mask, batch, keys, tokens)

    def masked_as(self, seen: Tensor, starts: list[int], keys: int) -> bool:
        """Whether its mask says that the rows' columns are seen which begin at these starts; waits for the device.

        Args:
            seen: the same as bool [B, at least keys].
        """
        mask = self.own_mask
        if mask is None:
            return not any(starts)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.device == seen.device:
            held = seen[:, :keys]
            return mask.shape[1] >= keys and torch.equal(mask[:, :keys].bool(), held)
        return self.rows(keys) == (starts, None)
