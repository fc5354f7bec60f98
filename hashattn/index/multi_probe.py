"""MultiProbe: hash tables over bits of the codes, probed where a query is least certain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.core.checks import check_int, keep_ints
from hashattn.index.base import Index, Spans, Store
from hashattn.index.buckets import BucketStore
from hashattn.ops.hamming.reference import popcount, unpack_bits

_UNSURE = 12  # bits of a table that are flipped, at most


@dataclass(frozen=True)
class MultiProbe(Index):
    """Multi-probe LSH (Lv et al., VLDB 2007): L tables of K bits, cut from the codes one after the other.

    A key is a candidate if it shares a bucket with one of a query's probes in any table: the query's own bucket and
    those with bits flipped, cheapest first, where flipping bits costs the sum of their squared margins (its 12 least
    certain bits of a table at most). Margins are read off the planes of a multi-bit query; one bit plane has none, and
    fewest flips go first. Candidates are ranked by their distance, as FlatHamming has it, with its tie rule; slots
    stay empty where there are fewer than k: a selector keeps the last key of a query that found none. More probes only
    add candidates, so that recall never falls.

    Kept beside the codes: the bucket of each key in each table and the keys in order of their buckets, 8 bytes a key
    and table. Keys that came after the last sorting are compared with the probes one by one.

    Args:
        tables: L.
        bits: K, 1 to 16; the encoder's codes need L * K.
        probes: P buckets a table, from 1 to 2^min(K, 12).
    """

    tables: int = 8
    bits: int = 12
    probes: int = 16

    scans = False

    def __post_init__(self) -> None:
        keep_ints(self, tables=1, bits=1, probes=1)
        check_int("bits", self.bits, 1, 16)
        check_int("probes", self.probes, 1, 1 << min(self.bits, _UNSURE), hint=f"for bits={self.bits}")

    def accepts(self, code: str) -> bool:
        return code == "binary"

    def why_not(self, bits: int, query_bits: int, biased: bool) -> str | None:
        if biased:
            return "its tables know of no bias; bias_bits=0 or index=FlatHamming() would fit"
        if self.tables * self.bits > bits:
            fit = max(1, bits // self.bits)
            return f"its tables take {self.tables * self.bits} bits, codes have {bits}; tables={fit} would fit"
        return None

    def key_bytes(self, row: int) -> float:
        return row + 8 * self.tables

    def remark(self) -> str:
        return "reads the codes of candidates alone; appends, crop and reorder native, sorted anew as it grows"

    def new_store(self, capacity: int | None = None) -> Store:
        return BucketStore(self.tables, self.bits, capacity)

    def search(self, store: Store, query: Tensor, k: int, spans: Spans) -> tuple[Tensor, Tensor]:
        """See :meth:`Index.search`; queries int64 [B, Hq, T, W] or planes [B, Hq, T, b, W]."""
        assert isinstance(store, BucketStore)
        shape, keys = query.shape[:3], len(store)
        planes = (query.unsqueeze(3) if query.ndim == 4 else query).flatten(0, 2)  # [Q, b, W]
        rows, ids, _ = self.candidates(store, query, spans)
        distances = torch.zeros_like(ids)
        codes = store.codes.flatten(0, 1)[rows // (len(planes) // store.lists), ids]  # [C, W]
        for j in range(planes.shape[1]):
            distances += popcount(codes ^ planes[rows, j]).sum(-1) << j
        far = 64 * planes.shape[2] << planes.shape[1]  # beyond every distance
        order = ((rows * far + distances) * keys + keys - 1 - ids).argsort()  # distinct integers: one order only
        rows, ids, distances = rows[order], ids[order], distances[order]
        found = torch.bincount(rows, minlength=len(planes))
        place = torch.arange(len(rows), device=rows.device) - (found.cumsum(0) - found)[rows]
        near = place < k
        at = rows[near], place[near]
        out = torch.full((2, len(planes), k), -1, dtype=torch.int32, device=query.device)
        out[1] = 0
        out[0].index_put_(at, ids[near].to(torch.int32))
        out[1].index_put_(at, distances[near].to(torch.int32))
        return out[0].view(*shape, k), out[1].view(*shape, k)

    def candidates(self, store: Store, query: Tensor, spans: Spans) -> tuple[Tensor, Tensor, int]:
        """The keys that share a bucket with a probe.

        Returns:
            the queries' numbers in [B, Hq, T] and the keys' columns, int64 [C], ascending, no pair twice; how many
            entries of buckets were read to find them.

        Raises:
            ValueError: queries of other words than the keys.
        """
        assert isinstance(store, BucketStore)
        if query.is_floating_point() or query.shape[-1] != store.codes.shape[-1]:
            raise ValueError(
                f"query must hold int64 codes of {store.codes.shape[-1]} words, as the keys do, got {query.dtype} of "
                f"{query.shape[-1]} words"
            )
        planes = (query.unsqueeze(3) if query.ndim == 4 else query).flatten(0, 2)  # [Q, b, W]
        rows, ids = store.members(self.buckets(planes).unflatten(0, (store.lists, -1)))
        entries = len(ids)
        visible = torch.tensor(spans, device=query.device).unsqueeze(1)  # [B, 1, T, 2]
        first, end = visible.expand(-1, query.shape[1], -1, -1).reshape(-1, 2).unbind(1)
        seen = (ids >= first[rows]) & (ids < end[rows])
        pairs = torch.unique(rows[seen] * len(store) + ids[seen])
        return pairs // len(store), pairs % len(store), entries

    def buckets(self, planes: Tensor) -> Tensor:
        """The buckets that queries int64 [Q, b, W] probe, best first: int64 [Q, L, P]."""
        length = self.tables * self.bits
        weights = 1 << torch.arange(planes.shape[1], device=planes.device).unsqueeze(1)
        levels = (unpack_bits(planes, length) * weights).sum(1)  # [Q, L * K]
        half = 1 << (planes.shape[1] - 1)
        positive = levels >= half
        margins = torch.where(positive, levels - half, half - 1 - levels) * 2 + 1  # of a half-step
        margins, positive = (x.unflatten(-1, (self.tables, self.bits)) for x in (margins, positive))
        bit = torch.arange(self.bits, device=planes.device)
        unsure = (margins * self.bits + bit).argsort(-1)[..., :_UNSURE]  # [Q, L, M], distinct: one order only
        costs, count = margins.gather(-1, unsure).square(), unsure.shape[-1]
        sets = torch.arange(1 << count, device=planes.device)
        cost = torch.zeros(*costs.shape[:2], len(sets), dtype=torch.int64, device=planes.device)
        flips = torch.zeros_like(cost)
        for m in range(count):
            member = (sets >> m) & 1
            cost += costs[..., m, None] * member
            flips += (1 << unsure[..., m, None]) * member
        best = (cost * len(sets) + sets).topk(self.probes, dim=-1, largest=False).indices
        own = (positive.long() << bit).sum(-1, keepdim=True)
        return own ^ flips.gather(-1, best)
