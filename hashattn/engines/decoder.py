"""Decoder: decode steps that CUDA graphs and torch.compile can capture, because lengths live on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.cache.kv_cache import KVCache
from hashattn.core.checks import check_float, check_kv, check_q, check_scale
from hashattn.core.lasting import lasting
from hashattn.engines.base import Request
from hashattn.engines.dense import Dense
from hashattn.engines.fused import Prepared, packed
from hashattn.engines.gpu import Gpu
from hashattn.engines.parts import Parts
from hashattn.ops import dense
from hashattn.ops.bounds import reference as bounds
from hashattn.ops.decode import Before, Map, Newest, why_not_encode
from hashattn.ops.decode.estimate import key_norms
from hashattn.ops.decode.sizes import counters

if TYPE_CHECKING:
    from hashattn.ops.decode.library import Encode


class Decoder:
    """Appends and attends without asking the device or telling the host. Made by attn.decoder(cache).

    A captured step serves every later length up to the cache's capacity; its graph points to what this object holds, so
    keep it. Until :meth:`finish` the cache itself does not know of what was appended, and must not be changed; after a
    change, :meth:`follow`. Beyond the capacity nothing is written and the output is NaN.

    Args:
        parts: of a composition that engine="gpu" serves, if its steps search.
        searches: whether they do; otherwise they attend densely.
        cache: made by it with a capacity, filled, beyond the warm-up of its centring if it is searched.
        led: the host leads the steps, so that the cache needs no capacity: it sees to the room before each step, tells
            :meth:`finish` how many there were, and takes another decoder once the cache's memory has moved.

    Attributes:
        length: int32 [1], filled columns.
        found: int64 [1], keys that were kept, counted only where a radius decides how many.
        kept: what the last step kept and its weights, for the decoder of the next layer (momentum); None where the
            selector asks for no weights.
        checks: whether some steps attend densely though it searches.

    Raises:
        ValueError: what does not fit, and what would.
    """

    @lasting
    def __init__(self, parts: Parts, cache: KVCache, *, searches: bool = True, led: bool = False) -> None:
        parts.check_cache(cache)
        if cache.capacity is None and not led:
            raise ValueError("cache must have a capacity, which a graph cannot change: new_cache(..., capacity=...)")
        self.dense, self.engine, self.led = not searches, Gpu() if searches else Dense(), led
        self.checks = False
        dense.register()
        self._check_filled(cache)
        device, encoder = cache.keys.device, parts.encoder
        self.parts, self.cache = parts, cache
        self.keys, self.values = cache.storage("keys").detach(), cache.storage("values").detach()
        if cache.capacity is None:  # memory that nobody has written: a huge number would be as bad as NaN
            self.keys[:, :, len(cache) :], self.values[:, :, len(cache) :] = 0, 0
        self.starts = cache.on_device.starts(cache._starts, device)
        self.length = torch.empty(1, dtype=torch.int32, device=device)
        self.found = torch.zeros(1, dtype=torch.int64, device=device)
        self.kept: Before | None = None
        self._arrived: dict[tuple[int, int], Tensor] = {}
        self._encoder_fits = encoder.fits if encoder is not None else 0
        self.maps: tuple[Map, Map] | None = None
        self.centre: Tensor | None = None
        if not self.dense and encoder is not None:
            if not why_not_encode(encoder.widths()):
                self.maps = encoder.maps(cache.head_dim, device)
            self.centre = cache.centre.float().clone(memory_format=torch.contiguous_format)
        self._prepared: dict[tuple[int, int], Prepared] = {}
        self._encode: dict[tuple[int, int], Encode] = {}
        self.follow()
        self._memory = self._places()
        of_maps = [x for by in self.maps or () for x in by.tensors]
        held = self.keys, self.values, self.starts, self.length, self.found, self.centre
        for tensor in (*held, *of_maps):
            self._stays(tensor)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, before: Before | None = None
    ) -> Tensor:
        """Append keys and values [B, Hkv, T, D] and attend with the queries [B, Hq, T, D] of the same positions.

        Args:
            before: `kept` of the decoder of the layer before, after its step of these positions; None if that layer
                attends densely.

        Returns:
            [B, Hq, T, D].
        """
        cache = self.cache
        check_float(q=q, k=k, v=v, keys=self.keys)
        check_kv(k, v, cache.batch, cache.kv_heads, cache.head_dim)
        check_q(q, cache.batch, cache.kv_heads, cache.head_dim, k.shape[2])
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"q and k must be of the same positions, got T = {q.shape[2]} and {k.shape[2]}")
        if not self.dense and (q.shape[1], q.shape[2]) not in self._prepared:
            self.prepare(q.shape[1], q.shape[2])
        return self.step(q, k, v, check_scale(scale, q.shape[-1]), before)

    @lasting
    def prepare(self, q_heads: int, tokens: int = 1, *, searches: bool = True) -> None:
        """Allocate what steps of so many query heads and queries need, so that a traced one need not.

        Args:
            searches: make the kernels ready that search; otherwise the first step that searches does.

        Raises:
            ValueError: they are not served.
        """
        cache, encoder = self.cache, self.parts.encoder
        if self.dense:
            return
        shape = cache.batch, q_heads, cache.kv_heads, cache.head_dim, tokens
        request = Request(self.keys.device, self.keys.dtype, *shape, captured=True)
        reasons = Gpu().why_not(self.parts, request)
        if reasons:
            raise ValueError(f'engine="gpu" cannot take this step: {"; ".join(reasons)}')
        if encoder is not None:
            encoder.check_model(q_heads, cache.kv_heads, cache.head_dim)
        from hashattn.ops.decode.library import Encode  # registers operators

        kind = q_heads, tokens
        prepared = Prepared.of(self.parts, cache, kind, self.length, centre=self.centre, searches=searches)
        like, stored = prepared.like, prepared.like.stored
        count = counters(cache.batch * q_heads * tokens, cache.batch * cache.kv_heads * tokens)
        arrived = self._arrived[q_heads, tokens] = torch.zeros(count, dtype=torch.int32, device=self.keys.device)
        for held in (stored.keys, stored.values, stored.codes, stored.norms, like.bounds, like.workspace, arrived):
            self._stays(held)
        if like.estimate is not None:
            self._stays(like.estimate.a)
        if self.maps is not None and encoder is not None and self.centre is not None:
            k = self.keys.new_empty((cache.batch, cache.kv_heads, tokens, cache.head_dim))
            newest = Newest(
                *(like.q, k, k, self.centre, self.maps, encoder.query_bits, stored, arrived, like.workspace)
            )
            self._encode[q_heads, tokens] = Encode(newest)
        self._prepared[q_heads, tokens] = prepared

    @lasting
    def prepare_check(self, q_heads: int, tokens: int) -> None:
        """The same for steps that append as those do which search, but attend densely.

        Raises:
            ValueError: they are not served.
        """
        if not self.serves(q_heads, tokens):
            self.prepare(q_heads, tokens, searches=False)
        if not self.checks:
            self.checks = True
            self.cache.clear_unseen()

    def revise(self, parts: Parts) -> None:
        """Take other parts with the same encoder, for what was prepared as well: captured steps are captured anew.

        Raises:
            ValueError: they are not served.
        """
        self.parts = parts
        for q_heads, tokens in [*self._prepared]:
            self.prepare(q_heads, tokens)

    def warm_up(self, q_heads: int) -> None:
        """Load the kernels, which a capture cannot do, by a step on zeros that leaves nothing behind."""
        cache = self.cache
        q = self.keys.new_zeros((cache.batch, q_heads, 1, cache.head_dim))
        k = self.keys.new_zeros((cache.batch, cache.kv_heads, 1, cache.head_dim))
        self.step(q, k, k, 1.0)  # into a column that is free
        if self.kept is not None:  # a layer before this one has other kernels
            self.follow()
            self.step(q, k, k, 1.0, self.kept)
            self.kept = None
        self.follow()

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, before: Before | None = None) -> Tensor:
        """The same as a call, of a kind that was prepared, without its checks of what is given."""
        if self.dense:
            dense.append(k, v, self.keys, self.values, self.length)
            return dense.attend(q, self.keys, self.values, self.starts, self.length, scale)
        prepared = self._prepared[q.shape[1], q.shape[2]]
        query = self._append(q, k, v)
        query = packed(self.parts, q, self.cache.kv_heads) if query is None else query
        output, selection = prepared.step(q, query, scale, before)
        if output.weights is not None:
            self.kept = Before(selection.ids, output.weights)
        if prepared.like.rule.radius is not None:
            self.found.add_((selection.ids >= 0).sum())
        return output.out

    def check(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The same with full attention, of a kind that was prepared so; codes are appended as well."""
        if self.dense:
            return self.step(q, k, v, scale)
        self._append(q, k, v)
        return dense.attend(q, self.keys, self.values, self.starts, self.length, scale)

    def _append(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Append keys, values and codes; returns the query's code where one launch makes both."""
        kind, encoder = (q.shape[1], q.shape[2]), self.parts.encoder
        if self.maps is not None:
            return self._encode[kind](q, k, v)
        like = self._prepared[kind].like
        stored = like.stored
        if encoder is None or like.page > 1:
            if encoder is not None:
                room = min(self.keys.shape[2], stored.codes.shape[2] * like.page)
                bounds.add(encoder.encode_key(k), stored.codes, self.starts, self.length, like.page, room)
            dense.append(k, v, self.keys, self.values, self.length)
            return None
        from hashattn.ops.decode.library import append

        assert self.centre is not None
        norms = key_norms(k, self.centre) if stored.norms is not None else None
        append(k, v, encoder.encode_key(k, self.centre), norms, stored, self._arrived[kind])
        return None

    def filled(self) -> Tensor:
        """Filled columns, int64 [], without waiting for the device: see ops.decode.library."""
        from hashattn.ops.decode.library import filled

        return filled(self.length)

    @property
    def room(self) -> int:
        """Columns that there are for keys, values, and codes if it searches."""
        return self.cache.capacity or min(room for _, room in self._places())

    def serves(self, q_heads: int, tokens: int) -> bool:
        """Whether steps of so many query heads and queries were prepared."""
        return self.dense or (q_heads, tokens) in self._prepared

    def finish(self, length: int | None = None) -> KVCache:
        """Let the cache know what was appended. Returns it.

        Args:
            length: filled columns, where the host knows them; None to wait for the device and ask it.

        Raises:
            ValueError: the captured steps went beyond the capacity; the cache holds what fitted.
        """
        length, room = int(self.length) if length is None else length, self.room
        self.cache.adopt(min(length, room), codes=not self.dense)
        if length > room:
            self.length.fill_(len(self.cache))
            raise ValueError(
                f"capacity is {room} columns, but {length} were appended: their outputs are NaN; make the cache larger"
            )
        return self.cache

    def follow(self) -> None:
        """Take up what the cache now holds, in place: captured steps go on from there.

        Raises:
            ValueError: a row holds too few keys.
        """
        cache = self.cache
        self._check_filled(cache)
        if self.dense or self.checks:  # whose steps read the whole room under a mask
            cache.clear_unseen()
        self.length.fill_(len(cache))
        self.found.zero_()
        cache.on_device.starts(cache._starts, self.length.device)
        if self.centre is not None:
            self.centre.copy_(cache.centre)  # encodes what was not

    def holds(self, cache: KVCache) -> bool:
        """Whether it is of this cache, whose keys are where they were."""
        return self.cache is cache and self.keys.data_ptr() == cache.storage("keys").data_ptr()

    def fits(self, cache: KVCache) -> bool:
        """Whether it is of this cache, whose memory is where it was, and its encoder what it was."""
        encoder = self.parts.encoder
        same = self.cache is cache and self._memory == self._places()
        return same and (encoder is None or encoder.fits == self._encoder_fits)

    def _places(self) -> list[tuple[int, int]]:
        """Where the cache's memory lies, and its room."""
        index = self.cache.index if not self.dense else None
        page = {"codes": index.page} if index is not None else {}
        searched = [*page, *(["norms"] if self.cache.with_norms and not self.dense else [])]
        held = {what: self.cache.storage(what) for what in ("keys", "values", *searched)}
        return [(x.data_ptr(), x.shape[2] * page.get(what, 1)) for what, x in held.items()]

    def _check_filled(self, cache: KVCache) -> None:
        least = max(1, 0 if self.dense else cache.warmup)
        if cache.shortest < least:
            raise ValueError(
                f"every row must hold at least {least} keys, so that its centre is frozen; the shortest holds "
                f"{cache.shortest}"
            )

    def _stays(self, held: Tensor | None) -> None:
        """Tell torch.compile that a tensor keeps its address: graphs then write to it in place."""
        if held is not None and not self.led:  # whose steps nobody compiles
            torch._dynamo.mark_static_address(held)
