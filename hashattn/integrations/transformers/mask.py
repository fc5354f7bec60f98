"""What an attention mask says about rows."""

from __future__ import annotations

import torch
from torch import Tensor


def read_mask(mask: Tensor, batch: int, keys: int, tokens: int) -> tuple[list[int], str | None]:
    """The rows' first columns, and why the mask is not a left padding with causality, if it is not.

    Args:
        mask: bool [B or 1, 1, T, N], or longer than N, as for a static cache; what is beyond N is not looked at.
        batch, keys, tokens: B, N, T; the queries are the last T of the N columns.
    """
    if mask.dtype != torch.bool or mask.shape[-1] < keys or mask.shape[-2] != tokens:
        shape = f"{mask.dtype} {[*mask.shape]}"
        return [0] * batch, f"the attention mask is {shape}, not boolean over {tokens} x {keys}"
    mask = mask[:, :1, :, :keys].expand(batch, 1, tokens, keys)
    starts: list[int] = mask[:, 0, -1].int().argmax(-1).tolist()
    columns = torch.arange(keys, device=mask.device)
    first = torch.tensor(starts, device=mask.device)[:, None, None, None]
    end = torch.arange(keys - tokens + 1, keys + 1, device=mask.device)[:, None]
    if not torch.equal(mask, (columns >= first) & (columns < end)):
        return starts, "the attention mask hides keys in the middle of a row; left padding and causality are served"
    return starts, None
