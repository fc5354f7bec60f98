"""HashAttention: encoder, index, selector and attend stage, composed."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hashattn.attend import Attend, ExactAttend
from hashattn.cache.kv_cache import KVCache
from hashattn.core.checks import check_finite, check_float, check_int, check_kv, check_q, check_scale
from hashattn.core.lasting import lasting
from hashattn.core.types import Output, Selection, Step
from hashattn.encoders import Encoder
from hashattn.engines.base import Call, Request
from hashattn.engines.choose import AUTO, Choice, choose, engine_name, ever_searches, searching
from hashattn.engines.decoder import Decoder
from hashattn.engines.dense import show
from hashattn.engines.parts import Parts
from hashattn.engines.plan import Plan, explain
from hashattn.index import Index
from hashattn.ops.decode.scratch import Scratch
from hashattn.selectors import Selector
from hashattn.selectors.base import nearest_word

if TYPE_CHECKING:
    from hashattn.integrations.transformers import Handle


@dataclass(frozen=True, repr=False)
class HashAttention:
    """Attention as search: keys are encoded and indexed once, queries search them, softmax runs over what was found.

    Args:
        encoder: turns keys and queries into codes; None if the selector ranks nothing.
        index: keeps the codes and scans them; None likewise.
        selector: which keys a query keeps; None for DenseAttend.
        attend: the softmax over what is kept.
        engine: "reference" (plain PyTorch, any device), "cpu" (compiled loops, or FAISS's scan and numpy), "gpu" (a
            fused step on an NVIDIA GPU, in CUDA C++ or Triton; "triton" is its other name), "dense" (full attention, no
            index), or "auto": the fastest of these, by what a step reads and does (hashattn/engines/choose.py).
        dense_layers: layers of a model that attend densely; negative numbers count from the last.

    Raises:
        ValueError: parts that do not fit; the message names both and what would fit.
    """

    encoder: Encoder | None = None
    index: Index | None = None
    selector: Selector | None = None
    attend: Attend = field(default_factory=ExactAttend)
    engine: str = "auto"
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", engine_name(self.engine))
        if not isinstance(self.dense_layers, tuple) or not all(type(i) is int for i in self.dense_layers):
            raise TypeError(f"dense_layers must be a tuple of layer numbers, got {self.dense_layers!r}")
        _ = self.parts  # which raises for those that do not fit

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> HashAttention:
        """A published method by name, such as "dashkv"; see :mod:`hashattn.presets`.

        Args:
            name: of the preset.
            options: its own, and `pretrained`: encoders that were fitted to a model, by the name of those that come
                with the library, a folder, or what from_pretrained() returned. Their kind must be the preset's; bits
                and the like come from there, and layers without an encoder attend densely. And `min_k`, where its
                selector has a floor: keys that are kept beyond the forced ones, however small the share.

        Raises:
            ValueError: an unknown name; the nearest one is named. Fitted encoders that do not fit the preset.
            TypeError: an option that the preset does not take; likewise.
        """
        from hashattn.presets import build  # presets stand above this module

        return build(name, **options)

    def replace(self, **parts: Any) -> HashAttention:
        """The same composition with some parts swapped; a selector's own settings: ``selector.revised(...)``.

        Raises:
            TypeError: a name of no part; the nearest one is named.
            ValueError: parts that do not fit.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in parts:
            if name not in known:
                own = self.selector is not None and name in self.selector.settings()
                hint = f"; selector=attn.selector.revised({name}=...) sets it" if own else nearest_word(name, known)
                raise TypeError(f"{name!r} is no part{hint}: there are {', '.join(known)}")
        return dataclasses.replace(self, **parts)

    def layer(self, i: int) -> HashAttention:
        """The composition for layer i of a model: every weighted part bound to that layer."""
        encoder = self.encoder.layer(i) if self.encoder is not None else None
        attend = self.attend.layer(i)
        return (
            self if encoder is self.encoder and attend is self.attend else self.replace(encoder=encoder, attend=attend)
        )

    @lasting
    def to(self, device: torch.device | str) -> HashAttention:
        """Move the weights of all parts to a device, in place. Returns itself."""
        for part in (self.encoder, self.attend, *(self.selector.weighted() if self.selector is not None else ())):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def new_cache(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        capacity: int | None = None,
        scratch: Scratch | None = None,
    ) -> KVCache:
        """An empty cache for keys and values [batch, kv_heads, N, head_dim]; dtype and device come with the first keys.

        Args:
            capacity: fixed number of columns, allocated at once; None grows as needed.
            scratch: device memory that fused steps write; give one Scratch to the caches of a model, which then share
                it and must run on one stream.
        """
        return KVCache(
            batch,
            kv_heads,
            head_dim,
            encoder=self.encoder,
            index=self.index,
            norms=self.attend.needs_norms,
            capacity=capacity,
            scratch=scratch,
        )

    def decoder(self, cache: KVCache) -> Decoder:
        """Decode steps on a cache with a capacity that a CUDA graph can capture; see :class:`hashattn.Decoder`."""
        return Decoder(self.parts, cache, searches=self.searches)

    def __call__(
        self,
        q: Tensor,
        k: Tensor | KVCache,
        v: Tensor | None = None,
        *,
        scale: float | None = None,
        causal: bool = True,
        start: Tensor | None = None,
        append: tuple[Tensor, Tensor] | None = None,
        validate: bool = False,
    ) -> Tensor:
        """Attend with queries to keys and values, or to a cache that holds them.

        Args:
            q: [B, Hq, T, D], post-RoPE; Hq a multiple of Hkv. The queries are the last T of the N positions.
            k: keys [B, Hkv, N, D], or a KVCache made by this composition.
            v: values [B, Hkv, N, D]; None with a cache.
            scale: of the logits, 1 / sqrt(D) by default.
            causal: each query sees the keys up to its own position; otherwise all of them.
            start: int [B], columns of left padding; a cache has its own.
            append: newest keys and values for a cache, which it holds from then on; see :meth:`run`.
            validate: also check that everything is finite.

        Returns:
            [B, Hq, T, D], the dtype of q.
        """
        if isinstance(k, KVCache):
            if v is not None or start is not None:
                raise TypeError("with a cache give neither v nor start: it holds both")
            cache = k
        else:
            if v is None:
                raise TypeError("v is missing: call attn(q, k, v), or attn(q, cache)")
            check_float(q=q, k=k, v=v)
            if k.ndim != 4:
                raise ValueError(f"k must be [B, Hkv, N, D], got {[*k.shape]}")
            check_kv(k, v, k.shape[0], k.shape[1], k.shape[3])
            check_q(q, k.shape[0], k.shape[1], k.shape[3], k.shape[2])
            cache = self.new_cache(k.shape[0], k.shape[1], k.shape[3])
            cache.append(k, v, start=start)
            if append is not None:
                raise TypeError("append is for a cache: give all keys and values as k and v")
        if validate and len(cache):
            padding = torch.arange(len(cache), device=q.device) < cache.start[:, None]
            k, v = (x.masked_fill(padding[:, None, :, None], 0) for x in (cache.keys, cache.values))
            check_finite(q=q, k=k, v=v)
        return self.run(q, cache, scale=scale, causal=causal, append=append)[0].out

    def run(
        self,
        q: Tensor,
        cache: KVCache,
        *,
        scale: float | None = None,
        causal: bool = True,
        step: Step | None = None,
        need_lse: bool = False,
        need_weights: bool = False,
        append: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Output, Selection | None]:
        """Attend to a cache; returns the Output with what was asked for, and the Selection (None where it ran dense).

        Args:
            step: the layer's number and the previous layer's selection, for momentum.
            need_lse, need_weights: whether Output carries these.
            append: keys and values [B, Hkv, n, D] that the cache appends first, as its append() does. A fused step
                writes those of its own queries in the launch that encodes them. What is refused leaves the cache as
                before.
        """
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, as new_cache() makes it, got {type(cache).__name__}")
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False, got {causal!r}")
        with cache.guard:
            before = 0 if append is None else len(cache)
            if append is not None:
                cache.expect(*append)
            try:
                call = Call(check_scale(scale, cache.head_dim), causal, step or Step(), need_lse, need_weights)
                choice = self.choice(q, cache)
            except BaseException:
                if append is not None:
                    cache.crop(before)
                raise
            run = choice.step(cache.longest) if self.parts.can_search(cache) else choice.dense
            try:
                return run(q, cache, call)
            finally:
                cache.kv.settle()

    def accumulate(
        self, q: Tensor, cache: KVCache, *, scale: float | None = None, causal: bool = True, step: Step | None = None
    ) -> None:
        """Show the selector what full attention of these queries, the cache's last positions, attends to.

        run() does so by itself; who attends elsewhere, as in a prefill, calls it. Most selectors look at nothing, and
        none at a position twice.
        """
        show(self.selector, q, cache, Call(check_scale(scale, q.shape[-1]), causal, step or Step()))

    @cached_property
    def parts(self) -> Parts:
        """What engines need of it."""
        return Parts(self.encoder, self.index, self.selector, self.attend)

    @property
    def searches(self) -> bool:
        """Whether it may search at all: not with engine="dense", nor with DenseAttend."""
        return ever_searches(self.parts, self.engine)

    def searching(self, device: torch.device | str) -> HashAttention:
        """The same, which searches at any length on such a device: "auto" becomes an engine that serves everything."""
        return self if self.engine != AUTO else self.replace(engine=searching(self.parts, device))

    def choice(self, q: Tensor, cache: KVCache, *, captured: bool = False) -> Choice:
        """Which engine serves these queries on this cache, from how many keys on, and why not another.

        Args:
            captured: whether steps are replayed from a graph, so that they cost the host nothing.

        Raises:
            TypeError, ValueError: they do not go together, or the engine that was named does not serve them.
        """
        if not isinstance(q, Tensor):
            raise TypeError(f"q must be a tensor, got {type(q).__name__}")
        fits = self.encoder.fits if self.encoder is not None else 0
        threads = torch.get_num_threads()
        held = cache.batch, cache.kv_heads, cache.head_dim, cache.kind
        kind = (q.shape, q.dtype, q.device, *held, fits, threads, captured)
        own = (cache.encoder, cache.index, cache.with_norms) == (self.encoder, self.index, self.attend.needs_norms)
        known = self._choices.get(kind) if own and q.shape[2] <= len(cache) else None
        if known is None:
            self.check_call(q, cache)
            request = dataclasses.replace(Request.of(q, cache), captured=captured)
            known = self._choices[kind] = choose(self.parts, request, self.engine)
        return known

    @cached_property
    def _choices(self) -> dict[Hashable, Choice]:
        return {}

    def check_call(self, q: Tensor, cache: KVCache) -> None:
        """Raise unless these queries can attend to this cache."""
        self.parts.check_cache(cache)
        if len(cache) == 0:
            raise ValueError("the cache is empty: append keys and values first")
        check_float(q=q, keys=cache.keys)
        check_q(q, cache.batch, cache.kv_heads, cache.head_dim, len(cache))
        if self.encoder is not None:
            self.encoder.check_model(q.shape[1], cache.kv_heads, cache.head_dim)

    def explain(
        self,
        *,
        batch: int = 1,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        keys: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> Plan:
        """The query plan of one decode step of one layer: engines, bytes against dense, memory of codes, crossover."""
        sizes = {"batch": batch, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "keys": keys}
        batch, q_heads, kv_heads, head_dim, keys = (check_int(name, size, 1) for name, size in sizes.items())
        if q_heads % kv_heads:
            raise ValueError(f"q_heads must be a multiple of kv_heads, got {q_heads} and {kv_heads}")
        request = Request(torch.device(device), dtype, batch, q_heads, kv_heads, head_dim)
        return explain(self.parts, request, keys, self.engine)

    def attach(self, model: nn.Module, *, strict: bool = True, **options: Any) -> Handle:
        """Serve a Hugging Face model's decoding; see :func:`hashattn.integrations.transformers.attach`."""
        from hashattn.integrations.transformers import attach  # the one declared upward import, lazy

        return attach(self, model, strict=strict, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # what is derived is made again

    def __repr__(self) -> str:
        fields = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        shown = [f"{name}={value!r}" for name, value, default in fields if value != default]
        return f"HashAttention({', '.join(shown)})"
