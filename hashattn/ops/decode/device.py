"""Where the kernels run: on an NVIDIA GPU, the one that holds their tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import torch

HERE = contextlib.nullcontext()


def why_not_nvidia() -> str | None:
    """Why what PyTorch calls "cuda" is no NVIDIA GPU, as the end of a sentence; None if it is one.

    PyTorch's builds for AMD's GPUs call these "cuda" as well.
    """
    if torch.version.hip is None:
        return None
    return f'its kernels need an NVIDIA GPU, and "cuda" is an AMD GPU here (ROCm {torch.version.hip})'


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


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


def check_nvidia(device: torch.device) -> None:
    """Raise RuntimeError if this is a GPU, but not NVIDIA's."""
    reason = why_not_nvidia()
    if device.type == "cuda" and reason is not None:
        raise RuntimeError(f"a fused step cannot run here: {reason}")


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within it this GPU is the current one, and kernels go to its current stream; nothing where they are emulated."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return HERE
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as a number; 0 where there are none."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)  # as Triton asks: a stream as an object takes microseconds
