"""Indexed: what a cache keeps of its keys to search them: codes, norms, and the centres that were subtracted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hashattn.cache.centres import Centres
from hashattn.cache.check_codes import check_codes
from hashattn.cache.new_codes import new_codes
from hashattn.core.buffer import TokenBuffer
from hashattn.core.lasting import lasting
from hashattn.encoders.base import Encoder
from hashattn.index.base import Index
from hashattn.ops.decode.estimate import NORMS
from hashattn.store.base import KVStore


class Indexed:
    """The index over a cache's keys, of which the first `len()` are encoded: codes == encode_key(keys[:, :, :len]).

    Args:
        encoder, index: of the composition; None for one that ranks nothing.
        norms: keep |k - centre| of each key.
        batch: rows.
        capacity: fixed number of keys, or None.

    Attributes:
        store: of the codes; None without an index.
        norms: bfloat16 [B, Hkv, length, 1] as rows.
        centres: of the rows.
    """

    def __init__(
        self, encoder: Encoder | None, index: Index | None, norms: bool, batch: int, capacity: int | None
    ) -> None:
        self.encoder, self.with_norms = encoder, norms
        self.store = index.new_store(capacity) if index is not None else None
        self.norms, self.centres = TokenBuffer(capacity), Centres(encoder, batch)
        self.fits = encoder.fits if encoder is not None else 0

    def __len__(self) -> int:
        return len(self.store) if self.store is not None else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return (self.store.nbytes if self.store is not None else 0) + self.norms.nbytes + self.centres.nbytes

    @property
    def settled(self) -> bool:
        """Whether encode() would do no more than encode the keys that are not yet encoded."""
        return self.encoder is not None and self.fits == self.encoder.fits and all(self.centres.ready)

    @property
    def current(self) -> bool:
        """Whether the codes are those of the encoder as it is fitted now."""
        return self.encoder is not None and self.fits == self.encoder.fits

    @lasting
    def encode(self, kv: KVStore, starts: list[int]) -> None:
        """Encode the keys that are not yet encoded, unless every row is short.

        Args:
            kv: what holds the keys; starts: each row's first column.
        """
        if self.encoder is None or self.store is None:
            return
        self.store.align(starts)
        if not self.current:  # fitted meanwhile: everything is encoded anew
            self.fits, self.centres = self.encoder.fits, Centres(self.encoder, len(starts))
            self.store.truncate(0)
        if not all(self.centres.ready):
            ready = self.centres.could_be_ready(len(kv), starts)
            if not any(ready):
                return
            if ready != self.centres.ready:  # what was encoded with another centre is encoded anew
                self.centres.freeze(kv.whole("keys").detach(), starts)
                self.truncate(0)
        encoded = len(self.store)
        if encoded == len(kv):
            return
        self.norms.truncate(encoded)
        k = kv.whole("keys")[:, :, encoded:] if self.with_norms else kv.newest(encoded)
        codes, norms = new_codes(self.encoder, k, self.centres, self.with_norms)
        if norms is not None:
            self.norms.append(norms)
        self.store.add(codes)

    def reserve(self, length: int) -> None:
        """Make room for codes and norms of so many keys, for a kernel to write in place; some are encoded already."""
        if self.store is not None:
            self.store.reserve(length)
            if self.with_norms:
                self.norms.reserve(length)

    def adopt(self, length: int) -> None:
        """Count codes and norms that a kernel wrote in place, up to `length`."""
        if self.store is not None:
            self.store.adopt(length)
            if self.with_norms:
                self.norms.adopt(length)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Move codes and norms within their rows, int64 [B, n]: of all columns that are named, or of none so far."""
        if self.store is not None and len(self.store):
            self.store.move(sources, targets)
            if self.with_norms:
                self.norms.move(sources, targets)

    def truncate(self, length: int) -> None:
        """Forget what is beyond the first `length` keys."""
        self.norms.truncate(length)
        if self.store is not None:
            self.store.truncate(length)

    def forget_centre(self, row: int) -> None:
        """Let a row wait for a new centre: everything is encoded anew then."""
        if self.centres.forget(row):
            self.truncate(0)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, int64 [n], in this order."""
        self.norms.select(rows)
        if self.store is not None:
            self.store.select_rows(rows)
        self.centres.select_rows(rows)

    def state_dict(self) -> dict[str, Any]:
        """As a part of KVCache.state_dict."""
        if not len(self) or self.store is None or not self.current:
            return {}
        state = {"codes": self.store.codes.clone()} if self.store.per_key else {}
        state |= self.centres.state_dict()
        return state | ({"norms": self.norms.view.clone()} if self.with_norms else {})

    def load_state_dict(self, state: Mapping[str, Any], starts: Sequence[int]) -> None:
        """Raises TypeError, ValueError for codes or norms that do not fit the composition."""
        self.centres.load_state_dict(dict(state))
        if "codes" in state or "norms" in state:
            check_codes(state, self.encoder if self.store is not None else None, self.with_norms)
            assert self.store is not None
            self.store.align([*starts])
            self.store.add(state["codes"])
            if self.with_norms:
                self.norms.append(state["norms"].to(NORMS))
