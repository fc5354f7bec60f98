"""What an attention mask says about rows."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = tuple[list[int], str | None]  # first column of each row, and why the mask cannot be served

HOLES = "the attention mask hides keys in the middle of a row; left padding and causality are served"


def read_mask(mask: Tensor, batch: int, keys: int, tokens: int) -> Rows:
    """The rows' first columns, and why the mask is not a left padding with causality, if it is not.

    Args:
        mask: bool [B or 1, H or 1, T, N], or longer than N, as for a static cache; what is beyond N is not looked at.
        batch, keys, tokens: B, N, T; the queries are the last T of the N columns.
    """
    fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[0] in (1, batch)
    if not fits or mask.dtype != torch.bool or mask.shape[-1] < keys or mask.shape[-2] != tokens:
        return [0] * batch, f"the attention mask is {_named(mask)}, not boolean over {tokens} x {keys}"
    mask = mask[..., :keys].expand(batch, -1, tokens, keys)
    first = _first(mask[:, 0, -1])
    columns = torch.arange(keys, device=mask.device)
    end = torch.arange(keys - tokens + 1, keys + 1, device=mask.device)[:, None]
    starts: list[int] = first.tolist()
    if not bool((mask == ((columns >= first[:, None, None, None]) & (columns < end))).all()):
        return starts, HOLES
    return starts, None


def read_padding(mask: Tensor, batch: int, keys: int) -> Rows:
    """The same of a mask [B, N] of the columns that hold a token, or longer than N."""
    if mask.shape[0] != batch or mask.shape[1] < keys:
        return [0] * batch, f"the attention mask is {_named(mask)}, not over {batch} x {keys}"
    mask = mask[:, :keys].bool()
    first = _first(mask)
    if not torch.equal(mask, torch.arange(keys, device=mask.device) >= first[:, None]):
        return first.tolist(), HOLES
    return first.tolist(), None


def _first(seen: Tensor) -> Tensor:
    """The first column that each row sees; as many as there are where it sees none, being padding so far."""
    return torch.where(seen.any(-1), seen.int().argmax(-1), seen.shape[-1])


def _named(mask: object) -> str:
    return f"{mask.dtype} {[*mask.shape]}" if isinstance(mask, Tensor) else type(mask).__name__
