"""CollisionSample: keys that share hash buckets with the query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.core.checks import keep_ints
from hashattn.core.collisions import Collisions
from hashattn.core.kinds import HoldsCodes, MakesCodes, Weighs
from hashattn.core.naming import short
from hashattn.core.types import CRITICAL, SAMPLED, Selection, Step
from hashattn.index.view import View
from hashattn.ops.hamming import popcount, words
from hashattn.selectors.base import Selector, forced_slots


@dataclass(frozen=True)
class CollisionSample(Selector):
    """Samples keys by collisions in hash tables, for SampledAttend to weigh (MagicPIG, arXiv 2410.16179).

    A key is found that agrees with the query in all bits of a table, for two tables at least; forced keys always are.
    How many is up to the data; a query that finds none keeps its last visible key. The weights, one over the
    probability of being found, need exact logits: SampledAttend makes them.

    The probability holds for SimHash(orthogonal=False), whose bits agree independently; orthogonal blocks of planes
    bias the estimated sums (1.5% too much at head_dim 32). Bit j of table l is bit 64 ceil(tables / 64) j + l of a
    code, so that whole words are compared at once.

    Args:
        tables: L.
        bits: K, of a table. The encoder's code is K * 64 * ceil(L / 64) bits long, 1920 for K=10 and L=150.
    """

    tables: int = 150
    bits: int = 10

    matrices = 2
    samples = True

    def __post_init__(self) -> None:
        keep_ints(self, tables=2, bits=1)

    @property
    def code_bits(self) -> int:
        """Bits that a code must have."""
        return 64 * self.bits * words(self.tables)

    def budget(self, visible: int, forced: int = 0) -> int:
        return visible

    def refuses(self, encoder: MakesCodes, index: HoldsCodes, attend: Weighs) -> str | None:
        if (
            encoder.code != "binary"
            or encoder.query_bits != 1
            or encoder.biased
            or not (encoder.angular and index.flat_codes)
        ):
            return (
                "compares codes of one plane, whose bits tell angles, bit by bit; encoder=SimHash(orthogonal=False) "
                "and FlatHamming() fit"
            )
        if encoder.bits != self.code_bits:
            return (
                f"makes {self.tables} tables of {self.bits} bits from codes of {self.code_bits} bits, not "
                f"{encoder.bits}; SimHash(bits={self.code_bits}, orthogonal=False) would fit"
            )
        if not attend.weighs_samples:
            return (
                f"needs its keys weighed by probability, which {short(attend)} does not do; SampledAttend() would fit"
            )
        return None

    def select(self, view: View, step: Step) -> Selection:
        if view.codes is None or view.query is None or view.query.ndim != 4:
            raise TypeError("CollisionSample compares codes of one plane: it needs a binary encoder and FlatHamming()")
        found = collisions(view.query, view.codes, self.tables, self.bits)
        near = (found >= 2) if view.kept is None else (found >= 2) & view.kept
        wanted = near & view.seen if view.forced is None else (near & view.seen) | view.forced
        last = torch.arange(view.keys, device=view.device) == view.visible[..., 1:].unsqueeze(1) - 1
        alone = last & view.seen & ~wanted.any(-1, keepdim=True)  # a query that found nothing keeps its last key
        near, wanted = near | alone, wanted | alone
        most = int(wanted.sum(-1).max()) if found.device.type == "cpu" else view.longest  # asking costs nothing there
        ids = view.calibrate(self.tables - found, near).search(max(1, most))
        sure = forced_slots(view, ids) | alone.any(-1, keepdim=True) & (ids >= 0)
        tier = torch.where(sure, CRITICAL, SAMPLED).to(torch.int8)
        return Selection(ids, tier, collisions=Collisions(self.tables, self.bits))


def collisions(query: Tensor, codes: Tensor, tables: int, bits: int) -> Tensor:
    """How many tables query codes [B, Hq, T, W] share with key codes [B, H, N, W]: int32 [B, Hq, T, N]."""
    q = query.unflatten(1, (codes.shape[1], -1)).unsqueeze(-2)  # [B, H, G, T, 1, W]
    k = codes[:, :, None, None]  # [B, H, 1, 1, N, W]
    each = words(tables)
    count = torch.zeros((), dtype=torch.int64, device=codes.device)
    for word in range(each):
        differ = torch.zeros((), dtype=torch.int64, device=codes.device)
        for bit in range(bits):
            at = bit * each + word
            differ = differ | (q[..., at] ^ k[..., at])
        used = min(64, tables - 64 * word)
        if used < 64:
            differ = differ | -(1 << used)  # bits of no table
        count = count + 64 - popcount(differ)
    return count.flatten(1, 2).to(torch.int32)
