"""Where the kernels run: on an NVIDIA GPU, the one that holds their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def why_not_nvidia() -> str | None:
    """Why what PyTorch calls "cuda" is no NVIDIA GPU, as the end of a sentence; None if it is one.

    PyTorch's builds for AMD's GPUs call these "cuda" as well.
    """
    if torch.version.hip is None:
        return None
    return f'its kernels need an NVIDIA GPU, and "cuda" is an AMD GPU here (ROCm {torch.version.hip})'


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; zeros where kernels are interpreted or emulated."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def registers(capability: tuple[int, int], many: bool = False) -> dict[str, int]:
    """Launch option of a Triton kernel of few warps: with many, and on GPUs later than Hopper, as many as it wants.

    The assembler else stops at what lets six programs run on a multiprocessor, and spills the few that are left over.
    """
    return {"maxnreg": 255} if many or capability >= (10, 0) else {}


def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (Hopper and later)."""
    return capability(device) >= (9, 0)


def on_its_device(launch: Callable[..., Result]) -> Callable[..., Result]:
    """Launch kernels on the GPU of the first tensor, on its current stream, whichever GPU is the current one.

    Raises:
        RuntimeError: it is no NVIDIA GPU.
    """

    @functools.wraps(launch)
    def there(first: Tensor, *others: Any, **options: Any) -> Result:
        if not first.is_cuda:  # interpreted or emulated
            return launch(first, *others, **options)
        reason = why_not_nvidia()
        if reason is not None:
            raise RuntimeError(f"a fused step cannot run here: {reason}")
        with torch.cuda.device(first.device):
            return launch(first, *others, **options)

    return there
