"""What an index is, and the store that flat indexes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hashattn.core.buffer import TokenBuffer
from hashattn.core.naming import short


class Store:
    """Codes of a cache's keys, [B, H, N, X], appended, cropped and reordered by the KVCache that owns it.

    A store that keeps more, or something else, extends these methods.

    Attributes:
        per_key: whether codes are those of the keys, one by one. A cache saves them then; it makes others anew.
        movable: whether codes are all that it keeps, so that they may be moved to other columns.
    """

    per_key: bool = True
    movable: bool = True

    def __init__(self, capacity: int | None = None) -> None:
        self._codes = TokenBuffer(capacity)

    def __len__(self) -> int:
        return self._codes.length

    @property
    def codes(self) -> Tensor:
        """The codes, a view [B, H, N, X]."""
        return self._codes.view

    @property
    def nbytes(self) -> int:
        """Bytes allocated for codes."""
        return self._codes.nbytes

    def align(self, starts: list[int]) -> None:
        """Told before keys are added where each row begins: its first visible column."""

    def add(self, codes: Tensor) -> None:
        """Append the codes of new keys, [B, H, n, X]."""
        self._codes.append(codes)

    def adopt(self, length: int) -> None:
        """Count codes that were written into the storage, up to `length`."""
        self._codes.adopt(length)

    def reserve(self, length: int) -> None:
        """Make room for the codes of so many keys, some of which are there."""
        self._codes.reserve(length)

    def truncate(self, length: int) -> None:
        """Keep the first `length` keys, or fewer: the cache adds again what is missing."""
        self._codes.truncate(length)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Move codes within their rows, int64 [B, n] columns, if they are movable."""
        self._codes.move(sources, targets)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        self._codes.select(rows)


Spans = Sequence[Sequence[Sequence[int]]]  # [B][T], (first, end): the columns that each query sees


class Index(ABC):
    """A description of an index: frozen, comparable, without data. A KVCache asks it for a store.

    Attributes:
        flat_codes: whether it ranks by the Hamming distance to every packed code, so that an engine may scan and
            search the codes in one pass.
        scans: whether it gives the distance to every key. An index that does not only searches, and serves selectors
            that ask for no more.
        scores: the family of its scores, for kernels to say which they serve; "" if only its own search gives them.
        page: columns of a page that share a code, counted from a row's first one; 1 for a code a key.
    """

    flat_codes: bool = False
    scans: bool = True
    scores: str = ""
    page: int = 1

    @abstractmethod
    def accepts(self, code: str) -> bool:
        """Whether it can hold what an encoder makes: "binary" (packed sign bits), "pq" or "vector" (floats)."""

    @abstractmethod
    def new_store(self, capacity: int | None = None) -> Store:
        """An empty store; with a capacity it is allocated once."""

    def why_not(self, bits: int, query_bits: int, biased: bool) -> str | None:
        """Why it cannot hold codes of an encoder with these properties, and what would fit; None if it can."""
        return None

    def key_bytes(self, row: int) -> float:
        """Bytes kept for a key, whose code has `row`."""
        return row

    def read_bytes(self, row: int) -> float:
        """Bytes that a query reads for a key, whose code has `row`, at most."""
        return row

    def remark(self) -> str:
        """What a query plan says of it beside its name."""
        return ""

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """Distances of queries to every key of the store, [B, Hq, T, N]; smaller is nearer.

        biased: whether the last byte of a code is a number to add; see :func:`hashattn.ops.hamming.distances`.

        Raises:
            TypeError: the index only searches.
        """
        raise TypeError(f"index {short(self)} gives no distance to every key: it only searches")

    def packed(self, query: Tensor, kv_heads: int) -> Tensor:
        """Encoded queries as fused steps score keys with them, contiguous, with five dimensions: [B, Hq, T, ...]."""
        return (query if query.ndim == 5 else query.unsqueeze(3)).contiguous()

    def search(self, store: Store, query: Tensor, k: int, spans: Spans) -> tuple[Tensor, Tensor]:
        """The nearest keys that the index finds for each query, among the columns that it sees.

        Args:
            spans: [B][T], (first, end); a row's queries see the same first column.

        Returns:
            ids int32 [B, Hq, T, k], nearest first, -1 in empty slots; distances int32 of the same shape.

        Raises:
            TypeError: the index scans.
        """
        raise TypeError(f"index {short(self)} has no search of its own: it gives the distance to every key")
