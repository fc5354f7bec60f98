"""Clock: seconds between what a device did, which runs behind the host on a GPU."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks are made as work is given out; seconds between them are asked for when all of it is done."""

    def mark(self) -> Any:
        """Now, for the device."""

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks."""


class HostClock:
    """Of a device that works in step with the host."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        return last - first


class CudaClock:
    """Of the current stream of a GPU: marks are events, so that nobody waits for them."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
