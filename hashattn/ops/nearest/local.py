"""The nearest keys of each of a number of chunks that columns are dealt to like cards."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.nearest.reference import nearest

RUN = 8  # neighbouring columns that are dealt together


def nearest_of_chunks(
    distances: Tensor, chunks: int, per_chunk: int, keep: Tensor, forced: Tensor | None = None, *, most_forced: int = 0
) -> Tensor:
    """The per_chunk nearest keys of each chunk, ties to the most recent. Column n is in chunk n // RUN % chunks.

    Args:
        distances: integers or floats [..., N].
        keep: bool, broadcasts to [..., N]; keys that may be selected.
        forced: bool, broadcasts to [..., N]; keys ranked before every distance (where `keep` allows them). A chunk
            with more than per_chunk of them keeps exactly these.
        most_forced: no chunk has more forced keys.

    Returns:
        int32 [..., chunks, max(per_chunk, most_forced)]: columns of each chunk in ascending order, then -1.
    """
    width, chunks = max(per_chunk, most_forced), min(chunks, max(1, -(-distances.shape[-1] // RUN)))  # others are empty
    dealt = deal(distances, chunks)
    ahead = None if forced is None else deal(forced & keep, chunks)
    places = nearest(dealt, width, deal(keep, chunks), ahead)
    if ahead is not None and most_forced > per_chunk:
        wanted = ahead.sum(-1, keepdim=True).clamp(min=per_chunk)
        places = places.masked_fill(torch.arange(places.shape[-1], device=places.device) >= wanted, -1)
    chunk = torch.arange(chunks, device=places.device)[:, None]
    last = torch.iinfo(torch.int32).max
    columns = (places // RUN * chunks + chunk) * RUN + places % RUN
    columns = torch.where(places < 0, last, columns).sort(-1).values
    columns = columns.masked_fill(columns == last, -1)
    return torch.nn.functional.pad(columns, (0, width - columns.shape[-1]), value=-1).to(torch.int32)


def deal(x: Tensor, chunks: int) -> Tensor:
    """[..., N] -> [..., chunks, places]: each chunk's columns in ascending order; zeros where there is no column."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % (RUN * chunks)))
    return x.unflatten(-1, (-1, chunks, RUN)).transpose(-3, -2).flatten(-2)


def most_of_span(columns: int, chunks: int) -> int:
    """No chunk has more than this of so many neighbouring columns."""
    rounds, rest = divmod(columns, RUN * chunks)
    return rounds * RUN + min(rest, RUN)
