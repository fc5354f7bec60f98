"""attach(): the hook, the attention function and the handle that takes both back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hashattn.attend import DenseAttend
from hashattn.attend.dense import dense
from hashattn.attention import HashAttention
from hashattn.cache import KVCache
from hashattn.engines import resolve
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.report import LayerRecord, Report, summarise
from hashattn.types import Selection, Step

NAME = "hashattn"
DENSE_LAYERS, DENSE_COMPOSITION = "dense_layers", "the composition attends densely"
_CALL = "hashattn_call"


@dataclass
class _Call:
    """What the hook tells the attention function: the layer's cache, or why there is none to search."""

    handle: Handle
    number: int
    kv: HashedLayer | None
    reason: str | None


@dataclass
class Handle:
    """A composition at work in a model, until detach(). Also a context manager.

    Made by attn.attach(model); see :func:`attach`.
    """

    attn: HashAttention
    model: nn.Module
    strict: bool
    max_sparse_q: int
    trace: bool
    refused: tuple[str, ...] = ()
    _layers: dict[int, HashAttention] = field(default_factory=dict)
    _records: dict[int, LayerRecord] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)
    _configs: list[tuple[Any, str | None]] = field(default_factory=list)
    _step: Step = field(default_factory=Step)
    _masked: tuple[Tensor, list[int], str | None] | None = None
    _dense_because: dict[int, str] = field(default_factory=dict)

    def report(self) -> Report:
        """What ran so far, per layer: sparse, dense by choice, dense because."""
        return summarise(self._records, self.refused)

    def reads(self) -> Tensor:
        """How often each position was read by one-token calls: int64 [layers, positions]. Needs trace=True."""
        if not self.trace:
            raise RuntimeError("reads are counted with attach(model, trace=True) only")
        rows = [r.reads for r in self._records.values()]
        width = max((len(r) for r in rows if r is not None), default=0)
        table = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            if row is not None:
                table[i, : len(row)] = row.cpu()
        return table

    def reset_report(self) -> None:
        """Start counting anew."""
        self._records = {i: LayerRecord() for i in self._records}

    def detach(self) -> None:
        """Give the model back exactly as it was. Caches made meanwhile stay usable. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        for config, implementation in self._configs:
            config._attn_implementation_internal = implementation
        self._hooks, self._configs = [], []
        self._step, self._masked = Step(), None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # ---- inside

    def _pre_hook(self, number: int) -> Any:
        """The forward pre-hook of one attention module: swaps the cache's layer, hands it to the attention function."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            kwargs[_CALL] = self._prepare(number, kwargs.get("past_key_values"))
            return args, kwargs

        return hook

    def _prepare(self, number: int, cache: Any) -> _Call:
        attn = self._layers.get(number)
        if attn is None:
            return _Call(self, number, None, self._dense_because[number])
        if cache is None:
            return _Call(self, number, None, "no cache")
        reason = support.why_not_cache(cache, number)
        if reason is not None:
            if self.strict:
                raise ValueError(f"this cache cannot be served: {reason} (attach with strict=False to run it densely)")
            return _Call(self, number, None, reason)
        while len(cache.layers) <= number:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[number]
        if not isinstance(layer, HashedLayer) or not same_cache(layer.attn, attn):
            layer = cache.layers[number] = HashedLayer.from_layer(layer, attn)
        layer.attn = attn
        return _Call(self, number, layer, None)

    def _attend(
        self, call: _Call, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        record, tokens = self._records[call.number], query.shape[2]
        kv = call.kv.kv if call.kv is not None else None
        if kv is None:
            record.dense[str(call.reason)] += 1
            self._step = Step()
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        reason = self._why_dense(call.number, query, kv, mask)
        if reason is not None:
            record.dense[reason] += 1
            self._step = Step()
            if tokens > 1 or (mask is not None and mask.dtype != torch.bool):
                return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
            self._count(record, None, query, kv)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return dense(query, key, value, mask, scale).out.transpose(1, 2).contiguous(), None
        attn = self._layers[call.number]
        step = self._step if self._step.layer < call.number else Step()
        wants = attn.selector is not None and attn.selector.needs_weights
        step = Step(call.number, step.previous, step.previous_weights)
        output, selection = attn.run(query, kv, scale=scaling, step=step, need_weights=wants)
        if selection is None:  # every row is still short
            record.dense["rows too short to be indexed"] += 1
        else:
            record.sparse += 1
        self._step = Step(call.number, selection, output.weights if selection is not None else None)
        if tokens == 1:
            self._count(record, selection, query, kv)
        return output.out.transpose(1, 2).contiguous(), None

    def _why_dense(self, number: int, query: Tensor, kv: KVCache, mask: Tensor | None) -> str | None:
        """Why this call of a served layer attends densely; None if it searches. Brings the rows' starts up to date."""
        if query.shape[2] > self.max_sparse_q:
            return "prefill"
        if number in self._dense_because:
            return self._dense_because[number]
        attn = self._layers[number]
        if mask is None:
            starts, reason = [0] * kv.batch, None
        else:
            if self._masked is None or self._masked[0] is not mask:
                self._masked = (mask, *read_mask(mask, kv, query.shape[2]))
            _, starts, reason = self._masked
        if reason is not None:
            if self.strict:
                raise ValueError(f"{reason} (attach with strict=False to run such calls densely)")
            return reason
        if starts != kv._starts:
            kv.set_start(torch.tensor(starts))
        if resolve(attn, query.device.type, kv.longest) == "dense":
            return "auto: dense is faster" if attn.engine == "auto" else "engine is dense"
        return None

    def _count(self, record: LayerRecord, selection: Selection | None, query: Tensor, kv: KVCache) -> None:
        """Book a one-token call."""
        keys = sum(max(0, len(kv) - s) for s in kv._starts)
        heads, key_bytes = query.shape[1], query.shape[3] * query.element_size()
        code_bytes = 0
        if kv.encoder is not None:
            row = 8 * -(-kv.bits // 64) if kv.encoder.code == "binary" else key_bytes
            code_bytes = row * kv.encoder.code_heads(kv.kv_heads)
        record.code_bytes, record.kv_bytes = kv.code_nbytes, kv.nbytes - kv.code_nbytes
        record.add_step(selection, heads, kv.kv_heads, keys, key_bytes, code_bytes)
        if self.trace:
            ids = selection.ids if selection is not None else torch.arange(len(kv), device=query.device)
            record.add_reads(ids, heads // ids.shape[1] if selection is not None else heads, len(kv))


def same_cache(held: HashAttention, wanted: HashAttention) -> bool:
    """Whether caches of one composition serve the other."""
    if held is wanted:
        return True
    norms = held.attend.needs_norms or not wanted.attend.needs_norms
    return held.encoder == wanted.encoder and held.index == wanted.index and norms


def read_mask(mask: Tensor, kv: KVCache, tokens: int) -> tuple[list[int], str | None]:
    """The rows' starts that a mask [B, 1, T, N] says, and why it is not a left padding with causality, if it is not."""
    starts = [0] * kv.batch
    if mask.dtype != torch.bool or mask.shape[-1] != len(kv) or mask.shape[-2] != tokens:
        return starts, f"the attention mask is {mask.dtype} {[*mask.shape]}, not boolean over {tokens} x {len(kv)}"
    mask = mask[:, :1].expand(kv.batch, 1, tokens, len(kv))
    starts = mask[:, 0, -1].int().argmax(-1).tolist()
    columns = torch.arange(len(kv), device=mask.device)
    first = torch.tensor(starts, device=mask.device)[:, None, None, None]
    end = torch.arange(len(kv) - tokens + 1, len(kv) + 1, device=mask.device)[:, None]
    if not torch.equal(mask, (columns >= first) & (columns < end)):
        return starts, "the attention mask hides keys in the middle of a row; left padding and causality are served"
    return starts, None


def hashed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that is registered with transformers under the name "hashattn"."""
    call: _Call | None = kwargs.pop(_CALL, None)
    if call is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return call.handle._attend(call, module, query, key, value, attention_mask, scaling, **kwargs)


def attach(
    attn: HashAttention, model: nn.Module, *, strict: bool = True, max_sparse_q: int = 1, trace: bool = False
) -> Handle:
    """Let a composition serve the decoding of a Hugging Face causal language model.

    model.generate(**inputs) then works with no argument added. Prefill stays dense; a call with at most
    `max_sparse_q` queries searches. Sliding-window layers and attn.dense_layers stay dense.

    Args:
        attn: the composition; its weights are moved to the model's device.
        model: a decoder model that uses transformers' attention interface.
        strict: refuse models, caches and masks that cannot be served. Without it they run densely, as report() says.
        max_sparse_q: queries of a call up to which it searches; raise it for speculative decoding.
        trace: count which positions are read; see Handle.reads().

    Returns:
        A Handle: report(), reads(), detach(); also a context manager.

    Raises:
        ValueError: the model cannot be served (strict), is attached already, or a part does not fit it.
    """
    if max_sparse_q < 1:
        raise ValueError(f"max_sparse_q must be at least 1, got {max_sparse_q}")
    reasons = support.why_not(model)
    if reasons and strict:
        raise ValueError(f"{type(model).__name__} cannot be attached: {'; '.join(reasons)}")
    handle = Handle(attn, model, strict, max_sparse_q, trace, tuple(reasons))
    if reasons:
        return handle
    modules = support.attention_modules(model)
    configs: dict[int, Any] = {id(m.config): m.config for m in modules.values()}
    if any(c._attn_implementation == NAME for c in configs.values()):
        raise ValueError("model is attached already: call detach() on its handle first")
    depth = len(modules)
    for i in attn.dense_layers:
        if not -depth <= i < depth:
            raise ValueError(f"dense_layers names layer {i}, but the model has {depth} layers")
    chosen = {i % depth for i in attn.dense_layers}
    for number, module in modules.items():
        handle._records[number] = LayerRecord()
        reason = support.layer_dense_by_design(module, number)
        if reason is None and number in chosen:
            reason = DENSE_LAYERS
        if reason is None and not attn.attend.needs_selection:
            reason = DENSE_COMPOSITION
        if reason is not None:
            handle._dense_because[number] = reason
            if reason in (DENSE_LAYERS, DENSE_COMPOSITION):  # still worth a cache that appends in place
                handle._layers[number] = HashAttention(attend=DenseAttend())
            continue
        layer = attn.layer(number)
        if layer.encoder is not None:
            layer.encoder.check_model(*support.heads(module))
        handle._layers[number] = layer
    attn.to(next(model.parameters()).device)
    AttentionInterface.register(NAME, hashed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it masks are None and left-padded rows go wrong
    for config in configs.values():
        handle._configs.append((config, config._attn_implementation_internal))
        config._attn_implementation_internal = NAME
    for number, module in modules.items():
        handle._hooks.append(module.register_forward_pre_hook(handle._pre_hook(number), with_kwargs=True))
    return handle
