"""FittedEncoder: what encoders share whose fit() makes one set of buffers a KV head, in closed form."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from hashattn.core.checks import check_fit, check_int
from hashattn.core.lasting import lasting
from hashattn.encoders.base import Encoder

Part = TypeVar("Part", bound=nn.Module)


class FittedEncoder(nn.Module, Encoder):
    """Buffers [Hkv, ...] that are empty until fit() or load_state_dict() fills them.

    Args:
        buffers: their names. The first one's second axis, if it has one, is D.
    """

    @lasting
    def __init__(self, *buffers: str) -> None:
        super().__init__()
        self._names = buffers
        for name in buffers:
            self.register_buffer(name, torch.empty(0))

    @abstractmethod
    def shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        """Of the buffers, in their order, once it is fitted to such a model."""

    def prepare(self, kv_heads: int, head_dim: int, device: torch.device) -> None:
        for name, shape in zip(self._names, self.shapes(kv_heads, head_dim), strict=True):
            setattr(self, name, torch.empty(shape, device=device))

    @property
    def fitted(self) -> bool:
        """Whether fit() ran or fitted buffers were loaded."""
        return self._first.numel() > 0

    @property
    def _first(self) -> Tensor:
        first: Tensor = getattr(self, self._names[0])
        return first

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        held = self._first.shape[:2]
        if self.fitted and held != (kv_heads, head_dim)[: len(held)]:
            dim = f" of head_dim {held[1]}" if len(held) > 1 else ""
            raise ValueError(
                f"this {type(self).__name__} was fitted to {held[0]} KV heads{dim}, but was given {kv_heads} of "
                f"head_dim {head_dim}"
            )

    def for_heads(self, first: int, count: int) -> Self:
        self.check_fitted()
        return part_of_heads(self, len(self._first), first, count, {name: 1 for name in self._names})

    def _pooled(self, k: Tensor, fewest: int | None = None) -> Tensor:
        """Keys [B, Hkv, N, D] of all rows, float64 [Hkv, B*N, D] on the CPU; ValueError if they are too few."""
        check_fit(k=k)
        fewest = k.shape[-1] if fewest is None else fewest  # for principal axes
        keys = k.detach().double().transpose(0, 1).flatten(1, 2).cpu()
        if keys.shape[1] < fewest:
            raise ValueError(
                f"k must hold at least {fewest} keys a head to fit {type(self).__name__} at head_dim {k.shape[-1]}, "
                f"got {keys.shape[1]}"
            )
        return keys

    @lasting
    def _fill(self, device: torch.device, **buffers: Tensor) -> None:
        """Set all buffers at once, as float32 on this device."""
        for name, value in buffers.items():
            setattr(self, name, value.float().contiguous().to(device))
        self.fits += 1

    def _by_head(self, q: Tensor, projection: Tensor) -> Tensor:
        """Queries [B, Hq, T, D] times the matrix [Hkv, D, X] of their KV head: float32 [B, Hq, T, X]."""
        grouped = q.float().reshape(q.shape[0], len(projection), -1, q.shape[-1])  # [B, Hkv, G*T, D]
        return (grouped @ projection).view(*q.shape[:3], projection.shape[-1])

    @lasting
    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in self._names:  # their shapes are known only once fitted
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self._first.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.fits += 1


def part_of_heads(module: Part, kv_heads: int, first: int, count: int, rows: Mapping[str, int]) -> Part:
    """A copy of a module that was fitted to so many KV heads, for `count` of them from `first` on; they share memory.

    Args:
        rows: of each parameter or buffer, how many rows a KV head has in it; 0 for what all heads share.

    Raises:
        ValueError: heads that are not there.
    """
    first, count = check_int("first", first, 0, kv_heads - 1), check_int("count", count, 1)
    if first + count > kv_heads:
        raise ValueError(f"heads {first} to {first + count - 1} were asked for, but it was fitted to {kv_heads}")
    part = copy.copy(module)
    part._parameters, part._buffers = dict(module._parameters), dict(module._buffers)
    for name, each in rows.items():
        held = getattr(module, name)
        if each and held is not None:
            own = held[first * each : (first + count) * each]
            setattr(part, name, nn.Parameter(own, held.requires_grad) if isinstance(held, nn.Parameter) else own)
    return part
