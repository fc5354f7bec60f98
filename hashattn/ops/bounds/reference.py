"""Specification of page bounds, in whole units: summed in float64, where the order of summation does not show."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 1024  # of a product, in what distances are counted
MOST = 1 << 17  # no bound is larger, so that sums over a group fit an int32


def distances(query: Tensor, bounds: Tensor) -> Tensor:
    """Negated bounds, rounded down, of queries [B, Hq, T, D] and pages [B, H, P, 2 D], the least of k and of -k.

    Returns:
        int32 [B, Hq, T, P]; a page with NaN is the nearest, so that it shows.
    """
    batch, q_heads, tokens, dim = query.shape
    grouped = query.reshape(batch, bounds.shape[1], -1, dim).double()  # [B, H, G*T, D]
    sides = torch.cat([(-grouped).clamp(min=0), grouped.clamp(min=0)], -1)
    distance = (sides @ bounds.double().transpose(-1, -2)).nan_to_num(nan=-MOST).clamp(-MOST, MOST)
    return (distance * UNIT).floor().to(torch.int32).view(batch, q_heads, tokens, bounds.shape[2])


def add(k: Tensor, bounds: Tensor, starts: Tensor, length: Tensor, page: int, room: int) -> None:
    """Take keys [B, Hkv, n, D] of the columns from `length` on, int32 [1], into the bounds of their pages, in place.

    Pages that hold no key yet are the largest number in every channel. Columns beyond the room change nothing.
    """
    columns = length.long() + torch.arange(k.shape[2], device=k.device)
    number = (columns - starts.long()[:, None]).clamp(min=0).div(page, rounding_mode="floor")  # [B, n]
    fits = (columns < room) & (number < bounds.shape[2])
    both = torch.cat([k, -k], -1).masked_fill(~fits[:, None, :, None], torch.finfo(k.dtype).max)
    at = number.clamp(max=bounds.shape[2] - 1)[:, None, :, None].expand_as(both)
    bounds.scatter_reduce_(2, at, both, "amin")


def of_columns(pages: Tensor, starts: Tensor, page: int, columns: int) -> Tensor:
    """Numbers of pages [B, Hq, T, P] as those of their columns [B, Hq, T, N]; pages begin at a row's first column."""
    at = torch.arange(columns, device=pages.device) - starts.to(pages.device).long()[:, None]
    number = at.clamp(min=0).div(page, rounding_mode="floor").clamp(max=pages.shape[-1] - 1)
    return pages.gather(-1, number[:, None, None].expand(*pages.shape[:3], -1))
