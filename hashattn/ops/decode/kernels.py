"""Kernels: what one folder's kernels serve, and how their steps are made ready."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from hashattn.ops.decode.inputs import Before, Inputs, Newest, Outputs, Placed, Stored
from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.request import KernelRequest

Decode = Callable[[Tensor, Tensor, float, Before | None], Outputs]  # of q, query, scale and what the layer before kept
Encode = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]  # of q, k, v, and the first column; None: see length
EncodePlaced = Callable[[Tensor, int, bool], Tensor]  # of q, the first column, and whether its keys are encoded too


class Kernels(ABC):
    """The kernels of a folder. What is made ready holds all that does not change from step to step."""

    @property
    @abstractmethod
    def language(self) -> str:
        """What they are written in."""

    @property
    @abstractmethod
    def calibrating(self) -> str:
        """What runs between scan and choice where distances are calibrated."""

    @abstractmethod
    def why_not_on(self, device: torch.device) -> list[str]:
        """Why they do not run on a device, whatever the step, as ends of sentences: every reason."""

    @abstractmethod
    def why_not(self, request: KernelRequest) -> list[str]:
        """Why they do not serve a step, and what would; [] if they do."""

    @abstractmethod
    def decode(self, like: Inputs) -> Decode:
        """A step like this one, of other queries of the same shape and dtype.

        Raises:
            ValueError, RuntimeError: what is given does not fit, or a kernel does not compile.
        """

    @abstractmethod
    def encode(self, like: Newest) -> Encode:
        """Encoding and appending like this, of other queries, keys and values of the same shape and dtype.

        Raises:
            ValueError, RuntimeError: as in decode.
        """

    @abstractmethod
    def encode_placed(self, like: Placed) -> EncodePlaced:
        """The same of other queries, and of the columns of the same positions if these have no code yet.

        Raises:
            ValueError, RuntimeError: as in decode.
        """

    @abstractmethod
    def encode_many(self, k: Tensor, centre: Tensor | None, by: Map, norms: bool) -> tuple[Tensor, Tensor | None]:
        """See :func:`hashattn.ops.decode.encode_reference.encode_many`."""

    @abstractmethod
    def append(
        self, k: Tensor, v: Tensor, codes: Tensor, norms: Tensor | None, stored: Stored, arrived: Tensor
    ) -> None:
        """See :func:`hashattn.ops.decode.encode_reference.append`; arrived: int32 [1], zero before and after."""
