"""tapped() and capture(): the queries, keys and values of a model's attention layers, to fit encoders with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.hooks import is_attached
from hashattn.integrations.transformers.own_configs import OwnConfigs

NAME = "hashattn_capture"

Sink = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Captured:
    """One layer's attention inputs, post-RoPE: q [B, Hq, T, D] of the last T positions, k and v [B, Hkv, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


@contextlib.contextmanager
def tapped(model: nn.Module, sink: Sink, layers: Iterable[int] | None = None) -> Iterator[None]:
    """While open, every call of the model is dense, and tells `sink` what its attention layers are given.

    sink(layer, q, k, v) runs before that layer attends: q [B, Hq, T, D] of the call's tokens, k and v [B, Hkv, N, D] of
    all tokens so far, all post-RoPE. They are the model's own tensors: what is to be kept must be copied.

    Args:
        model: a causal language model that can be attached.
        sink: is called once a layer and call, in the order in which the layers run.
        layers: which layers; all of full attention by default.

    Raises:
        ValueError: the model cannot be served, a layer it does not have, or an attached model.
    """
    modules, wanted = support.attention_modules(model), set(capturable(model, layers))
    if is_attached(model):
        raise ValueError("model is attached: detach it first")
    assert isinstance(model, PreTrainedModel)
    configs = OwnConfigs()  # other models may share the model's

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        number = int(module.layer_idx)  # type: ignore[arg-type]
        if number in wanted:
            sink(number, query, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        configs.install(model, modules, NAME)
        yield
    finally:
        configs.restore()
        AttentionInterface.register(NAME, sdpa_attention_forward)  # keeps nothing alive


def capturable(model: nn.Module, layers: Iterable[int] | None = None) -> list[int]:
    """The layers that can be captured, ascending: those of full attention, or of these the ones that are asked for.

    Raises:
        ValueError: the model cannot be served, or a layer it does not have.
    """
    reasons = support.why_not(model)
    if reasons:
        raise ValueError(f"{type(model).__name__} cannot be captured: {'; '.join(reasons)}")
    full = [i for i, m in support.attention_modules(model).items() if support.layer_dense_by_design(m, i) is None]
    wanted = sorted(set(full if layers is None else layers))
    if not wanted or not set(wanted) <= set(full):
        raise ValueError(f"layers must be among {full}, got {sorted(set(wanted) - set(full))}")
    return wanted


@torch.no_grad()
def capture(
    model: nn.Module, input_ids: Tensor, *, layers: Iterable[int] | None = None, queries: int | None = None
) -> dict[int, Captured]:
    """Run a model over a text once, densely, and keep what its attention layers were given.

    hashattn.lab.learning.capture writes the same to files, for texts that do not fit into memory.

    Args:
        model: a causal language model that can be attached.
        input_ids: int64 [B, N], without padding.
        layers: which layers to keep; all of full attention by default.
        queries: keep those of the last so many positions only; all by default.

    Returns:
        layer number -> Captured, on the model's device.

    Raises:
        ValueError: the model cannot be served, a layer it does not have, or an attached model.
    """
    kept: dict[int, Captured] = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        last = q[:, :, -queries:] if queries is not None else q
        kept[layer] = Captured(last.clone(), k.clone(), v.clone())

    with tapped(model, keep, layers):
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    return dict(sorted(kept.items()))
