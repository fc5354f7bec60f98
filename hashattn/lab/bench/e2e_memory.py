"""What fits the memory of a GPU: asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hashattn.encoders.base import Encoder
from hashattn.lab.bench.e2e_model import Llama

RESERVE = 4 << 30  # bytes for what is neither weights nor cache: graphs, libraries, encoding


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    return torch.cuda.mem_get_info(device)[0]


def needed(size: Llama, encoder: Encoder, keys: int, batch: int) -> int:
    """Bytes for decoding so many sequences of so many keys."""
    return RESERVE + size.weight_bytes + batch * keys * size.token_bytes(encoder)


def plan(
    size: Llama, encoder: Encoder, sizes: Sequence[tuple[int, int]], batches: Sequence[int] | None, device: torch.device
) -> list[tuple[int, int, int]]:
    """(keys, k, batch) of every case; where no batches are given: 1 and the most that fit.

    Raises:
        ValueError: a case does not fit the memory.
    """
    free, todo = free_memory(device), []
    for keys, k in sizes:
        one = needed(size, encoder, keys, 1)
        most = 1 + (free - one) // (keys * size.token_bytes(encoder))
        for batch in batches or sorted({1, max(1, most)}):
            if batch > most:
                raise ValueError(
                    f"{batch} sequences of {keys:,} keys need {needed(size, encoder, keys, batch) / 2**30:,.1f} GiB, "
                    f"of which weights {size.weight_bytes / 2**30:,.1f}, and {free / 2**30:,.1f} are free: "
                    + (f"at most {most} fit" if most > 0 else "take fewer keys")
                )
            todo.append((keys, k, batch))
    return todo
