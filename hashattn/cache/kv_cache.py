"""KVCache: keys, values and what is indexed of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.cache.centres import Centres
from hashattn.cache.check_state import Shape, check_state
from hashattn.cache.device_state import DeviceState
from hashattn.cache.indexed import Indexed
from hashattn.core.attention_sums import AttentionSums
from hashattn.core.checks import check_int, check_kv, check_query, check_start, row_index, row_order
from hashattn.core.guard import Guard, guarded
from hashattn.core.lasting import lasting
from hashattn.core.types import Table
from hashattn.encoders.base import Encoder
from hashattn.index.base import Index
from hashattn.index.view import View
from hashattn.ops.attend import logits as exact_logits
from hashattn.ops.decode.scratch import Scratch
from hashattn.store.base import KVStore
from hashattn.store.resident import Resident, rows_of


class KVCache:
    """Keys and values of one layer with the index over them: the database of that layer.

    Made by attn.new_cache(). It owns its index store and alone appends, crops and reorders it. Columns are shared by
    the batch; row b begins at column start[b] (left padding). Keys are encoded late and in bulk, when a search first
    needs them: codes == encode_key(keys[:, :, :encoded]) always holds.

    Threads that change or search one cache come one after the other; what each of them asks is for them to settle.

    An encoder that asks for centring gets, per row and KV head, a share of the mean of the row's first keys after the
    sinks, frozen as soon as the row has that many; until then the row is "short" and attends densely.

    It holds numbers, not the graph that computed them. Gradients reach the keys and values of the last append, until
    the cache changes again; those before are constants. attn(q, k, v) appends once: there all of them get theirs.

    Args:
        batch, kv_heads, head_dim: B, Hkv, D.
        encoder, index: of the composition; None for one that ranks nothing.
        norms: keep |k - centre| of each key, bfloat16.
        capacity: fixed number of columns; None grows by a quarter when full.
        store: of keys and values, empty; Resident by default.
        scratch: device memory of the fused steps, to share among the caches of a model; None for one of its own.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, *, encoder: Encoder | None = None, index: Index | None = None,
        norms: bool = False, capacity: int | None = None, scratch: Scratch | None = None, store: KVStore | None = None,
    ) -> None:  # fmt: skip
        self.batch, self.kv_heads = check_int("batch", batch, 1), check_int("kv_heads", kv_heads, 1)
        self.head_dim = check_int("head_dim", head_dim, 1)
        self.capacity = capacity = None if capacity is None else check_int("capacity", capacity, 1)
        self.encoder, self.index, self.with_norms = encoder, index, norms
        self.kv: KVStore = store if store is not None else Resident(capacity)
        self.indexed = Indexed(encoder, index, norms, self.batch, capacity)
        self._starts = [0] * self.batch  # host copy of start
        self.attention_sums = AttentionSums(capacity)
        self._fitting: tuple[Any, ...] | None = None  # what was appended last, which fits: steps are alike
        self.guard = Guard()
        self.on_device = DeviceState(scratch if scratch is not None else Scratch())

    def __len__(self) -> int:
        return len(self.kv)

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, N, D], a view."""
        self._check_filled()
        return self.kv.whole("keys")

    @property
    def values(self) -> Tensor:
        """[B, Hkv, N, D], a view."""
        self._check_filled()
        return self.kv.whole("values")

    @property
    def allocated(self) -> tuple[Tensor, Tensor]:
        """Keys and values with the room behind them, [B, Hkv, room, D]; that is zeros where there is a capacity."""
        self._check_filled()
        return self.kv.storage("keys"), self.kv.storage("values")

    @property
    def wants_grad(self) -> bool:
        """Whether gradients go on to keys or values that were appended, if any arrive."""
        return self.kv.wants_grad

    @property
    def codes(self) -> Tensor:
        """Codes of all keys (of none while every row is short), a view: int64 [B, heads, encoded, W]."""
        self.encode()
        store = self.indexed.store
        if store is None or len(store) == 0:
            raise ValueError("nothing is encoded: the composition has no index, or every row is still short")
        return store.codes

    @property
    def norms(self) -> Tensor:
        """|k - centre|, bfloat16 [B, Hkv, encoded, 1], a view."""
        self.encode()
        norms = self.indexed.norms
        return norms.traced.narrow(2, 0, norms.length)

    @property
    def centre(self) -> Tensor:
        """What is subtracted from the keys before encoding: float32 [B, Hkv, D]; zero for short rows."""
        self.encode()
        centre = self.centres.subtracted
        if centre is None:
            return torch.zeros(self.batch, self.kv_heads, self.head_dim, device=self.keys.device)
        return centre

    @property
    def bits(self) -> int:
        """Length of a code; 0 without binary codes."""
        return self.encoder.bits if self.encoder is not None else 0

    @property
    def encoded(self) -> int:
        """Keys that the index holds."""
        return len(self.indexed)

    @property
    def start(self) -> Tensor:
        """First column of each row, int64 [B]."""
        return torch.tensor(self._starts, device=self.kind[1] if self.kind else None)

    @property
    def longest(self) -> int:
        """Visible keys of the longest row."""
        return max(0, len(self) - min(self._starts))

    @property
    def shortest(self) -> int:
        """Visible keys of the shortest row."""
        return max(0, len(self) - max(self._starts))

    @property
    def centres(self) -> Centres:
        """What is subtracted from each row's keys."""
        return self.indexed.centres

    @property
    def warmup(self) -> int:
        """Visible keys that a row needs before its centre is frozen; 0 if the encoder asks for none."""
        return self.centres.warmup

    @property
    def kind(self) -> tuple[torch.dtype, torch.device] | None:
        """Type and device of what it holds; None before the first keys."""
        return self.kv.kind

    @property
    def ready(self) -> list[bool]:
        """For each row, whether a search can serve it."""
        return self.centres.could_be_ready(len(self), self._starts)

    @property
    def code_nbytes(self) -> int:
        """Bytes allocated for codes, norms, centres and attention sums."""
        return self.indexed.nbytes + self.attention_sums.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all."""
        return self.kv.nbytes + self.code_nbytes

    # ---- changing it

    @guarded
    def append(self, k: Tensor, v: Tensor, *, start: Tensor | None = None) -> None:
        """Append keys and values [B, Hkv, n, D] of the next n columns.

        Args:
            start: int [B], columns of left padding of each row, which are kept as zeros; only with the first append.

        Raises:
            TypeError: dtypes that are not floating point, differ, or differ from what the cache holds.
            ValueError: shapes that disagree, no room left, or a start that is out of range. The cache is as before.
        """
        self._check_new(k, v)
        starts = None
        if start is not None:
            if len(self):
                raise ValueError("start is given with the first append only, or changed by set_start")
            starts = check_start(start, self.batch, k.shape[2])
        self.kv.append(k, v)
        if starts is not None:
            self._starts = starts
            for row, first in enumerate(starts):  # padding may hold NaN, and 0 * NaN would reach a masked sum
                self.kv.clear_before(row, first)

    @guarded
    def expect(self, k: Tensor, v: Tensor) -> None:
        """The same, for a step that follows at once and may write them itself: whoever else looks at keys does first.

        They must not change before that; settle() ends it.
        """
        self._check_new(k, v)
        self.kv.expect(k, v)

    @guarded
    def settle(self) -> None:
        """Write what is still expected."""
        self.kv.settle()

    @guarded
    def adopt(self, length: int, *, codes: bool = True) -> None:
        """Count columns that a Decoder wrote in place, with or without their codes and norms, up to `length`."""
        self.kv.adopt(check_int("length", length, 0))
        if codes:
            self.indexed.adopt(length)

    @guarded
    def set_start(self, start: Tensor) -> None:
        """Change the first column of each row, int [B]; rows that change lose their centre.

        Columns that were padding in the first append hold zeros: they do not come back.
        """
        starts = check_start(start, self.batch, len(self))
        for row, (old, new) in enumerate(zip(self._starts, starts, strict=True)):
            if old != new:
                self.indexed.forget_centre(row)
        self._starts = starts

    @guarded
    def clear_unseen(self) -> None:
        """Make zeros of what is not finite in the padding and in the free columns, for who reads all of them masked."""
        self.kv.clear_unseen(self._starts)

    @guarded
    def crop(self, length: int) -> None:
        """Keep the first `length` columns. Rows left with too few keys for their centre lose it.

        Raises:
            NotAnInteger, ValueError: not a number from 0 to the columns there are, or one at which the votes of a
                selector that looks back are no longer known. The cache is as before.
        """
        length = check_int("length", length, 0, len(self))
        reason = self.attention_sums.why_not_crop(length)
        if reason is not None:
            raise ValueError(f"length {length} is a crop that cannot be made: {reason}")
        self.attention_sums.crop(length, self.keys if len(self) else None, self._starts)
        self.kv.truncate(length)
        self.indexed.truncate(length)
        for row, first in enumerate(self._starts):
            if length - first < self.warmup:
                self.indexed.forget_centre(row)

    def why_not_move(self) -> str | None:
        """Why columns cannot be moved; None if they can."""
        if self.attention_sums.nbytes:
            return "its selector looks back at columns"
        store = self.indexed.store
        return None if store is None or store.movable else "its index knows keys by their columns"

    @guarded
    def move(self, sources: Tensor, targets: Tensor, starts: list[int]) -> None:
        """Let columns of each row hold what others held, codes included; rows then begin at these columns.

        Columns that a Decoder has appended may be among them. Rows keep their centres.

        Args:
            sources, targets: int64 [B, n], columns on the cache's device; all is read before anything is written. A
                target that stands twice has the same source.

        Raises:
            ValueError: they cannot be moved.
        """
        reason = self.why_not_move()
        if reason is not None:
            raise ValueError(f"columns of this cache cannot be moved: {reason}")
        self.kv.move(sources, targets)
        self.indexed.move(sources, targets)
        self._starts = [*starts]
        self.on_device.follow(self._starts)

    @guarded
    @lasting
    def select_rows(self, rows: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep these batch rows, in this order; rows may repeat.

        Args:
            rows: numbers, int [n], or a mask, bool [batch]: of the rows to keep. A list or tuple of either will do.

        Raises:
            TypeError: neither numbers nor a mask.
            ValueError: none, one that is not there, or a mask of another length; the cache is as before.
        """
        rows = row_index(rows, self.batch)
        picked: list[int] = rows.tolist()
        if self.kind is not None:
            rows = rows.to(self.kind[1])
        self.kv.select_rows(rows)
        self.attention_sums.select(rows)
        self.indexed.select_rows(rows)
        self._starts = [self._starts[r] for r in picked]
        self.batch = len(picked)

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Reorder rows, as beam search does: row i becomes what row rows[i] was; int [batch].

        Raises:
            TypeError, ValueError: as select_rows(); a mask; another number of rows.
        """
        self.select_rows(row_order(rows, self.batch))

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times, next to each other."""
        self.select_rows(torch.arange(self.batch).repeat_interleave(check_int("times", times, 1)))

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.crop(0)
        self._starts = [0] * self.batch

    # ---- searching it

    @guarded
    def encode(self) -> None:
        """Encode the keys that are not yet encoded, unless every row is short."""
        self.indexed.encode(self.kv, self._starts)

    def forget_code(self) -> None:
        """Let the newest key wait to be encoded again, as it does after an append: for benchmarks."""
        self.indexed.truncate(len(self) - 1)

    def spans(self, tokens: int, causal: bool = True) -> list[list[tuple[int, int]]]:
        """The columns (first, end) seen by `tokens` queries that are the last ones, for each row and query."""
        last = len(self)
        ends = range(last - tokens + 1, last + 1) if causal else [last] * tokens
        return [[(first, end) for end in ends] for first in self._starts]

    def seen(self, tokens: int, causal: bool = True) -> Tensor | None:
        """The same as a mask, bool [B, 1, T, N]; None if every query sees every column."""
        if not any(self._starts) and (tokens == 1 or not causal):
            return None
        visible = torch.tensor(self.spans(tokens, causal), device=self.keys.device)
        columns = torch.arange(len(self), device=visible.device)
        return ((columns >= visible[..., :1]) & (columns < visible[..., 1:])).unsqueeze(1)

    def view(
        self, query: Tensor | None, q_heads: int, spans: Table, *, host: bool = False, q: Tensor | None = None,
        scale: float = 1.0,
    ) -> View:  # fmt: skip
        """What a selector sees, for encoded queries and the columns visible to them; see :meth:`spans`.

        Args:
            q: the queries themselves, for selectors that ask for exact logits, which are scaled by `scale`.
        """
        self.encode()
        index, store = self.index, self.indexed.store
        biased = self.encoder is not None and self.encoder.biased

        def scan() -> Tensor:
            if index is None or store is None or query is None:
                raise TypeError("this composition has no index, so there are no distances")
            return index.distances(store, query, biased=biased, host=host)

        def logits(ids: Tensor) -> Tensor:
            assert q is not None
            keys, _, at = self.kv.selected(ids)
            return exact_logits(q.detach(), keys.detach(), at, scale, host=host)  # they choose: no gradients

        def find(k: int) -> tuple[Tensor, Tensor]:
            assert index is not None and store is not None and query is not None
            return index.search(store, query, k, spans)

        searches = query is not None and index is not None and not index.scans
        binary = index is not None and (index.flat_codes or searches)
        codes = store.codes if store is not None and binary and len(store) else None
        assert self.kind is not None
        device = self.kind[1]
        return View(
            spans, q_heads, self.kv_heads, len(self), scan, device, query, codes, host, biased=biased,
            find=find if searches else None, logits=None if q is None else logits, attention_sums=self.attention_sums,
        )  # fmt: skip

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ANN view: the k nearest keys of encoded queries, among all keys of their row.

        Args:
            query: from encoder.encode_query: int64 [B, Hq, T, W] or planes [B, Hq, T, b, W].
            k: how many.

        Returns:
            ids int32 [B, Hq, T, min(k, N)], nearest first, ties to the most recent, -1 where a row has no more;
            distances of the same shape (int32; float32 for exact scores), meaningless where ids are -1.

        Raises:
            TypeError, ValueError: a query of other rows or heads, an empty cache, k < 1, or a row too short to
                have a centre.
        """
        self._check_filled()
        k = check_int("k", k, 1)
        check_query(query, self.batch, self.kv_heads)
        if not all(self.ready):
            short = [b for b, r in enumerate(self.ready) if not r]
            raise ValueError(f"rows {short} hold fewer than {self.warmup} keys, from which their centre is made")
        view = self.view(query, query.shape[1], self.spans(query.shape[2], causal=False))
        ids, distances = view.nearest_with_distances(k)
        empty = 0, min(k, len(self)) - ids.shape[-1]  # the longest row may be shorter than N
        return F.pad(ids, empty, value=-1), F.pad(distances, empty)

    def gather(self, what: str, ids: Tensor) -> Tensor:
        """Rows of "keys", "values", "codes" or "norms" at columns ids [B, H, T, K]: [B, H, T, K, X].

        Empty slots (-1) read a row that is kept anyway, so that no padding is touched while anything is kept.
        """
        return self.kv.rows(what, ids) if what in ("keys", "values") else rows_of(self.storage(what), ids)

    def selected(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`hashattn.store.KVStore.selected`."""
        return self.kv.selected(ids)

    def storage(self, what: str) -> Tensor:
        """All that is allocated for "keys", "values", "codes" or "norms", contiguous [B, heads, room, X]."""
        if what == "codes":
            if self.indexed.store is None:
                raise ValueError("the composition has no index, so there are no codes")
            return self.indexed.store._codes.storage
        if what not in ("keys", "values", "norms"):
            raise ValueError(f"what must be one of keys, values, norms and codes, got {what!r}")
        return self.indexed.norms.traced if what == "norms" else self.kv.storage(what)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything it holds, as contiguous tensors and plain numbers."""
        self._check_filled()
        state: dict[str, Any] = {"keys": self.keys.clone(), "values": self.values.clone(), "start": self.start}
        return state | self.indexed.state_dict() | self.attention_sums.state_dict()

    @lasting
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by a state_dict of a cache of the same composition and shape.

        Raises:
            TypeError, ValueError: a field that is missing, unknown, or does not fit the others, this cache or its
                composition. The cache is as before.
        """
        other = KVCache(
            self.batch, self.kv_heads, self.head_dim, encoder=self.encoder, index=self.index, norms=self.with_norms,
            capacity=self.capacity, scratch=self.on_device.scratch,
        )  # fmt: skip
        check_state(state, Shape(self.batch, self.kv_heads, self.head_dim, self.warmup))
        other.append(state["keys"], state["values"])
        other._starts = state["start"].tolist()
        other.indexed.load_state_dict(state, other._starts)
        other.attention_sums.load_state_dict(state)
        self.__dict__.update(other.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        twin = copy.copy(self)
        for name, value in self.__dict__.items():
            if name not in ("encoder", "index", "on_device"):  # parts are shared
                twin.__dict__[name] = copy.deepcopy(value, memo)
        twin.on_device = DeviceState(copy.deepcopy(self.on_device.scratch, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_device": None}  # pointed to by steps of this process alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, on_device=DeviceState(Scratch()))

    def __repr__(self) -> str:
        return (
            f"KVCache(batch={self.batch}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, keys={len(self)}, "
            f"encoded={self.encoded}, nbytes={self.nbytes})"
        )

    def _check_new(self, k: Tensor, v: Tensor) -> None:
        alike = self.batch, *((x.shape, x.dtype, x.device, x.layout) for x in (k, v) if isinstance(x, Tensor))
        if alike != self._fitting:
            check_kv(k, v, self.batch, self.kv_heads, self.head_dim)
            if self.kind is not None and (k.dtype, k.device) != self.kind:
                dtype, device = self.kind
                raise TypeError(f"k must match the cache, {dtype} on {device}, got {k.dtype} on {k.device}")
            self._fitting = alike if self.kind is not None else None
        if self.capacity is not None and len(self) + k.shape[2] > self.capacity:
            raise ValueError(
                f"k has {k.shape[2]} columns, but {self.capacity - len(self)} of capacity {self.capacity} are left"
            )

    def _check_filled(self) -> None:
        if len(self) == 0:
            raise ValueError("the cache is empty: append keys and values first")
