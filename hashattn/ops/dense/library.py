"""Dense steps as operators of torch, which torch.compile takes for one node each; importing this registers them."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.dense import steps

_OPS = torch.library.Library("hashattn", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_OPS.define("dense_append(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) length) -> ()", tags=_TAGS)
_OPS.define(
    "dense_attend(Tensor q, Tensor keys, Tensor values, Tensor starts, Tensor length, float scale) -> Tensor",
    tags=_TAGS,
)
for _device in ("CPU", "CUDA"):
    _OPS.impl("dense_append", steps.append, _device)
    _OPS.impl("dense_attend", steps.attend, _device)


@torch.library.register_fake("hashattn::dense_append", lib=_OPS)
def _append_fake(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    return None


@torch.library.register_fake("hashattn::dense_attend", lib=_OPS)
def _attend_fake(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, length: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)
