"""Random compositions on random walks through a cache's operations, against an oracle that shares no code with them.

A failure names its seed and what was done: `python -m tests.contract.test_walks SEED` walks there again.
"""

from __future__ import annotations

import copy
import math
import pickle
import sys
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from hashattn import (
    PQ,
    Centring,
    Consensus,
    CrossPolytope,
    DenseAttend,
    ExactAttend,
    FaissBinary,
    FlatBuckets,
    FlatDot,
    FlatHamming,
    FlatPQ,
    FlatRaBitQ,
    HashAttention,
    Identity,
    LocalTopK,
    MixedPrecision,
    MultiProbe,
    Pages,
    RaBitQ,
    Recent,
    SimHash,
    Sink,
    SymmetricHash,
    Threshold,
    Tiers,
    TopK,
)
from hashattn.core.types import MEDIUM
from tests.contract.oracle import (
    Array,
    Contents,
    Kept,
    Rule,
    attend,
    biased,
    buckets,
    choose,
    differing,
    estimate,
    hamming,
    looked_up,
    page_bounds,
    probed,
    products,
    rabitq,
)

CHUNKS, WALKS = 20, 100
FLOATS = ("vector", "rabitq")  # families of distances that are rounded
FAMILIES = ("binary", "binary", "binary", "buckets", "none", "biased", "pq", "pages", "probes", *FLOATS)
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Plan:
    """A composition, and what the oracle has to know of it."""

    attn: HashAttention
    rule: Rule
    family: str  # of FAMILIES
    heads: int
    group: int
    dim: int
    dtype: torch.dtype
    capacity: int | None

    @property
    def centring(self) -> Centring | None:
        return self.attn.encoder.centring if self.attn.encoder is not None else None

    @property
    def warmup(self) -> int:
        return self.centring.warmup if self.centring is not None else 0


def plan(random: Random) -> Plan:
    """A composition out of thousands."""
    heads, group, dim = random.choice([1, 2]), random.choice([1, 1, 2, 3]), random.choice([4, 8, 16])
    family = random.choice(FAMILIES)
    centring = random.choice([None, None, Centring(1.0, 5, 1), Centring(0.5, 8, 0), Centring(0.5, 3, 2)])
    encoder: Any = None
    index: Any = None
    if family == "binary":
        index = random.choice([FlatHamming(), FlatHamming(), FlatHamming(), FaissBinary("BFlat")])
        encoder = SimHash(random.choice([8, 13, 64, 65]), random.choice([1, 1, 2, 4]), centring, random.randrange(9))
    elif family == "buckets":
        index, encoder = FlatBuckets(), CrossPolytope(random.choice([3, 8, 9]), random.choice([2, 8]), centring)
    elif family == "vector":
        index, encoder = FlatDot(), Identity()
    elif family == "biased":
        index, encoder = FlatHamming(), weighted(SymmetricHash(64, bias_bits=8), heads, dim, random)
    elif family == "pq":
        index, encoder = FlatPQ(), PQ(random.choice([1, 2, 4]), sub_bits=4, shared=random.random() < 0.5)
        generator = torch.Generator().manual_seed(random.randrange(9))
        size = 1 if encoder.shared else heads, encoder.subquantisers, 16, dim // encoder.subquantisers
        encoder.codebooks, encoder.fits = torch.randn(size, generator=generator) + 0.3, 1
    elif family == "rabitq":
        index, encoder = FlatRaBitQ(), RaBitQ(random.choice([0, 0, 16, 70]), centring, random.randrange(9))
    elif family == "pages":
        index, encoder = Pages(random.choice([1, 4, 16])), Identity()
    elif family == "probes":
        encoder = SimHash(random.choice([12, 65]), random.choice([1, 2, 4]), centring, random.randrange(9))
        bits = random.choice([3, 4])
        index = MultiProbe(random.choice([1, 3]), bits, random.choice([1, 3, 8]))
    rule, selector = choice(random, family, encoder)
    attention: Any = ExactAttend()
    if rule.kind == "tiers" and family == "binary" and random.random() < 0.7:
        attention = MixedPrecision(hidden=0, a=random.choice([0.8, 1.3]))
    if random.random() < 0.04:
        rule, selector, encoder, index, attention, family = Rule("nearest"), None, None, None, DenseAttend(), "none"
    engine = random.choice(["reference", "cpu", "cpu", "dense"] if random.random() < 0.3 else ["reference", "cpu"])
    dtype = random.choice([torch.float32] * 5 + [torch.bfloat16, torch.float16, torch.float64])
    attn = HashAttention(encoder, index, selector, attention, engine)
    return Plan(attn, rule, family, heads, group, dim, dtype, random.choice([None, None, 150]))


def choice(random: Random, family: str, encoder: Any) -> tuple[Rule, Any]:
    """What is kept, as the oracle and as hashattn have it."""
    sinks, recents = random.choice([(0, 0), (0, 0), (2, 0), (0, 3), (1, 4), (40, 40)])
    kind = "forced" if family == "none" else random.choice(["nearest", "nearest", "tiers", "threshold", "chunks"])
    per, combine = random.choice(["query_head", "kv_head"]), random.choice(["sum", "sum", "union", "vote"])
    if family in FLOATS and kind in ("threshold", "chunks"):
        kind = "nearest"  # a float is on neither side of a radius for sure
    if family == "probes":
        kind, per = "nearest", "query_head"
    k = random.choice([1, 2, 5, 12, 500])
    share = random.choice([0.01, 0.1, 0.33, 0.5, 1.0])
    rule, selector = Rule("forced"), None
    if kind == "nearest":
        by = {"k": k} if random.random() < 0.5 else {"share": share}
        rule, selector = Rule(kind, **by, per=per, combine=combine), TopK(**by, per=per, combine=combine)
    elif kind == "tiers":
        t1 = random.choice([0.01, 0.1, 0.3])
        t2 = random.choice([0.31, 0.5, 1.0])
        rule, selector = Rule(kind, share=t2, critical=t1, per=per, combine=combine), Tiers(t1, t2, per, combine)
    elif kind == "threshold":
        farthest = {"pq": 3000, "pages": 9000, "biased": 200, "buckets": 9}.get(family, encoder.bits)
        if family == "binary":
            farthest *= (1 << encoder.query_bits) - 1
        radius, limit = (
            random.choice([0, farthest // 3, farthest // 2, farthest, 2**40]),
            random.choice([None, None, 3]),
        )
        rule = Rule(kind, k=limit, radius=radius, per=per, combine=combine)
        selector = Threshold(radius, limit, per, combine)
    elif kind == "chunks":
        per_chunk = random.choice([1, 2, 5])
        chunks = random.choice([1, 3, 4])
        rule = Rule(kind, k=chunks * per_chunk, per_chunk=per_chunk, per=per, combine=combine)
        selector = LocalTopK(chunks * per_chunk, per_chunk, per, combine)
    if (
        selector is not None
        and kind in ("nearest", "tiers")
        and family not in (*FLOATS, "probes")
        and random.random() < 0.15
    ):
        vote_share, discount = random.choice([0.3, 0.5]), random.choice([0, 2, 3])
        selector = Consensus(selector, vote_share=vote_share, discount=discount)
        rule = Rule(**{**vars(rule), "vote_share": vote_share, "discount": discount})
    if selector is None and not sinks + recents:
        sinks = 1
    parts = [
        *([Sink(sinks)] if sinks else []),
        *([Recent(recents)] if recents else []),
        *([selector] if selector else []),
    ]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined | part
    return Rule(**{**vars(rule), "sinks": sinks, "recents": recents}), joined


def weighted(encoder: SymmetricHash, heads: int, dim: int, random: Random) -> SymmetricHash:
    """A learned hash whose bias, and whose centre, are drawn."""
    generator = torch.Generator().manual_seed(random.randrange(9))
    encoder.build(dim).build_bias(heads)
    assert encoder.key_bias is not None
    with torch.no_grad():
        encoder.key_bias.out.normal_(generator=generator)
    encoder.mean, encoder.fits = 0.3 * torch.randn(heads, dim, generator=generator), 1
    return encoder


class Walk:
    """One cache and what the oracle holds of it."""

    def __init__(self, seed: int) -> None:
        self.random, self.seed = Random(seed), seed
        self.generator = torch.Generator().manual_seed(seed)
        self.plan = plan(self.random)
        self.done: list[str] = [repr(self.plan.attn)]
        batch = self.random.choice([1, 2, 3])
        self.cache = self.plan.attn.new_cache(batch, self.plan.heads, self.plan.dim, capacity=self.plan.capacity)
        self.held = Contents(batch, self.plan.heads, self.plan.dim)

    def go(self) -> None:
        """Some operations, each followed by a look; an error tells how it got there."""
        try:
            self.append()
            for _ in range(self.random.randint(2, 6)):
                if self.random.random() < 0.6 and len(self.held):
                    self.look()
                getattr(self, self.random.choice(OPERATIONS))()
                self.compare_contents()
            if len(self.held):
                self.look()
        except Exception as error:
            steps = "\n  ".join(self.done)
            raise AssertionError(f"walk {self.seed}, {type(error).__name__}: {error}\n  {steps}") from error

    # ---- operations

    def append(self) -> None:
        random, batch, n = self.random, self.held.batch, self.random.choice([1, 1, 2, 7, 20, 33])
        if self.plan.capacity is not None and len(self.held) + n > self.plan.capacity:
            with pytest.raises(ValueError, match="capacity"):
                self.cache.append(*self._normal(2, batch, self.plan.heads, n, self.plan.dim).unbind(0))
            return
        k, v = self._normal(2, batch, self.plan.heads, n, self.plan.dim).unbind(0)
        if random.random() < 0.1:  # equal keys tie
            k = k[:, :, :1].expand_as(k).clone()
        starts = None
        if not len(self.held) and random.random() < 0.5:
            starts = [random.choice([0, random.randint(0, n)]) for _ in range(batch)]
        self.done.append(f"append {n} columns, start={starts}")
        self.cache.append(k, v, start=None if starts is None else torch.tensor(starts))
        self.held.append(k.double().numpy(), v.double().numpy(), starts)

    def crop(self) -> None:
        length = self.random.choice([self.random.randint(0, len(self.held)), max(0, len(self.held) - 1)])
        self.done.append(f"crop to {length}")
        self.cache.crop(length)
        self.held.crop(length)

    def reorder(self) -> None:
        rows = [self.random.randrange(self.held.batch) for _ in range(self.held.batch)]
        self.done.append(f"reorder {rows}")
        self.cache.reorder(torch.tensor(rows))
        self.held.select(rows)

    def repeat(self) -> None:
        if self.held.batch <= 2:
            self.done.append("repeat 2")
            self.cache.repeat(2)
            self.held.select([row for row in range(self.held.batch) for _ in range(2)])

    def select_rows(self) -> None:
        rows = [self.random.randrange(self.held.batch) for _ in range(self.random.choice([1, 2, 3]))]
        kind = self.random.choice(["tensor", "list", "tuple", "mask"])
        if kind == "mask":
            mask = [row in rows for row in range(self.held.batch)]
            rows = [row for row, keep in enumerate(mask) if keep]
            given: Any = torch.tensor(mask)
        else:
            given = {"tensor": torch.tensor(rows), "list": rows, "tuple": tuple(rows)}[kind]
        self.done.append(f"select_rows {given}")
        self.cache.select_rows(given)
        self.held.select(rows)

    def set_start(self) -> None:
        starts = [self.random.choice([0, self.random.randint(0, len(self.held))]) for _ in range(self.held.batch)]
        self.done.append(f"set_start {starts}")
        self.cache.set_start(torch.tensor(starts))
        self.held.starts = starts

    def reset(self) -> None:
        self.done.append("reset")
        self.cache.reset()
        self.held.reset()

    def encode(self) -> None:
        self.done.append("encode")
        self.cache.encode()

    def state(self) -> None:
        if len(self.held):
            self.done.append("state_dict into a new cache")
            state = self.cache.state_dict()
            self.cache.reset()
            args = self.held.batch, self.plan.heads, self.plan.dim
            self.cache = self.plan.attn.new_cache(*args, capacity=self.plan.capacity)
            self.cache.load_state_dict(state)

    def pickled(self) -> None:
        if not isinstance(self.plan.attn.encoder, torch.nn.Module):
            self.done.append("pickle")
            self.cache = pickle.loads(pickle.dumps(self.cache))

    def copied(self) -> None:
        self.done.append("deepcopy")
        before, self.cache = self.cache, copy.deepcopy(self.cache)
        before.reset()

    # ---- what is compared

    def compare_contents(self) -> None:
        cache, held = self.cache, self.held
        assert (len(cache), cache.batch, cache.start.tolist()) == (len(held), held.batch, held.starts)
        if len(held):
            assert np.array_equal(cache.keys.double().numpy(), held.keys)
            assert np.array_equal(cache.values.double().numpy(), held.values)

    def look(self) -> None:
        """Attend with some queries."""
        random, plan, held = self.random, self.plan, self.held
        tokens = random.randint(1, min(3, len(held)))
        causal, scale = random.random() < 0.8, random.choice([None, 0.3])
        engine = plan.attn.engine if random.random() < 0.7 else random.choice(["reference", "cpu"])
        attn = plan.attn.replace(engine=engine)
        q = self._normal(held.batch, plan.heads * plan.group, tokens, plan.dim)
        self.done.append(f"attend with {tokens} queries, causal={causal}, scale={scale}, engine={engine}")
        with torch.no_grad():
            output, selection = attn.run(q, self.cache, causal=causal, scale=scale, need_lse=True)
            query = plan.attn.encoder.encode_query(q) if plan.attn.encoder is not None else None
        codes, norms, centres = self._index()
        scale = plan.dim**-0.5 if scale is None else scale
        for row in range(held.batch):
            for t in range(tokens):
                first, end = held.visible(row, t, tokens, causal)
                end = max(first, end)
                keys, dense = held.keys[row], selection is None or end - first < plan.warmup
                distances = np.zeros((q.shape[1], len(held)), np.int64)
                if not dense and plan.family != "none":
                    assert query is not None and codes is not None
                    distances = np.stack(
                        [self._distances(query[row, h, t], codes[row, h // plan.group], row) for h in range(q.shape[1])]
                    )
                kept = [Kept(set(range(first, end)), set())] * q.shape[1]
                if not dense:
                    found = None
                    if plan.family == "probes":
                        assert query is not None and codes is not None
                        of_heads = [(query[row, h, t], codes[row, h // plan.group]) for h in range(q.shape[1])]
                        found = [self._probed(*of_head) for of_head in of_heads]
                    kept = choose(plan.rule, distances, plan.heads, first, end, found)
                for h, own in enumerate(kept):
                    one = q[row, h, t].double().numpy()
                    if selection is not None:
                        chosen = self._selected(selection, row, h, t)
                        if chosen.all != own.all or chosen.critical != own.critical:
                            wide = 512 * EPS * float(np.linalg.norm(one)) * float(np.linalg.norm(keys[h // plan.group]))
                            assert plan.family in FLOATS and own.margin <= wide, (
                                f"row {row}, head {h}, query {t} keeps {chosen}, not {own}"
                            )
                            own = chosen
                    logits = {n: float(one @ keys[h // plan.group, n]) * scale for n in own.critical}
                    for n in own.medium:
                        if norms is None:
                            logits[n] = float(one @ keys[h // plan.group, n]) * scale
                            continue
                        assert query is not None and codes is not None
                        signs = as_bytes(query[row, h, t] if query.ndim == 4 else query[row, h, t, -1])
                        off = int(differing(signs, codes[row, h // plan.group, n][None])[0])
                        bits, a = self.cache.bits, plan.attn.attend.a.item()
                        own_centre, norm = centres[row, h // plan.group], float(norms[row, h // plan.group, n, 0])
                        logits[n] = estimate(one, own_centre, a, norm, off, bits) * scale
                    out, lse = attend(logits, held.values[row, h // plan.group])
                    self._close(output, row, h, t, out, lse, logits)

    def _close(self, output: Any, row: int, h: int, t: int, out: Array, lse: float, logits: dict[int, float]) -> None:
        size = max(map(abs, logits.values()), default=0.0)
        unit = max(EPS, torch.finfo(self.plan.dtype).eps)
        found, found_lse = output.out[row, h, t].double().numpy(), float(output.lse[row, h, t])
        if not logits:
            assert not found.any() and found_lse == -math.inf
            return
        values = float(np.abs(self.held.values).max())
        assert abs(found_lse - lse) <= 64 * EPS * (1 + size), (
            f"row {row}, head {h}, query {t}: lse {found_lse}, not {lse}"
        )
        off = float(np.abs(found - out).max())
        allowed = (64 * EPS * (1 + size) + 4 * unit) * values
        assert off <= allowed, f"row {row}, head {h}, query {t}: off by {off} of {allowed}"

    def _selected(self, selection: Any, row: int, h: int, t: int) -> Kept:
        head = h * selection.ids.shape[1] // (self.plan.heads * self.plan.group)
        ids = selection.ids[row, head, t].tolist()
        tier = [0] * len(ids) if selection.tier is None else selection.tier[row, head, t].tolist()
        filled = [n for n in ids if n >= 0]
        assert len(set(filled)) == len(filled), f"a column twice in {ids}"
        medium = {n for n, of in zip(ids, tier, strict=True) if n >= 0 and of == MEDIUM}
        return Kept(set(filled) - medium, medium)

    def _distances(self, query: torch.Tensor, codes: Array, row: int) -> Array:
        family, index = self.plan.family, self.plan.attn.index
        if family == "vector":
            return products(query.double().numpy(), codes)
        if family == "pq":
            return looked_up(query.numpy(), codes)
        if family == "rabitq":
            return rabitq(query.double().numpy(), codes)
        if family == "pages":
            assert isinstance(index, Pages)
            return page_bounds(query.double().numpy(), codes, self.held.starts[row], index.page)
        planes = as_bytes(query)
        if family == "buckets":
            return buckets(planes, codes)
        return biased(planes, codes) if family == "biased" else hamming(np.atleast_2d(planes), codes)

    def _probed(self, query: torch.Tensor, codes: Array) -> set[int]:
        index = self.plan.attn.index
        assert isinstance(index, MultiProbe)
        return probed(np.atleast_2d(as_bytes(query)), codes, index.tables, index.bits, index.probes)

    def _index(self) -> tuple[Array | None, Array | None, Array]:
        """Codes and norms of all keys as the cache has them, once they are what encoding these keys gives; centres."""
        plan, cache, held = self.plan, self.cache, self.held
        centring = plan.centring
        centres = np.zeros((held.batch, plan.heads, plan.dim))
        if centring is not None:
            centres = held.centres(centring.strength, centring.keys, centring.skip)
            ready = [len(held) - first >= plan.warmup for first in held.starts]
            assert cache.ready == ready
            if not any(ready):
                return None, None, centres
        if plan.attn.encoder is None:
            return None, None, centres
        if plan.family == "pages":  # whose bounds of keys in the padding nobody looks at
            cache.encode()
            return held.keys, None, centres
        if isinstance(plan.attn.encoder, SymmetricHash):
            centres += plan.attn.encoder.mean.double().numpy()
        codes = cache.codes
        assert np.abs(cache.centre.double().numpy() - centres).max(initial=0) <= 1e-5
        expected = plan.attn.encoder.encode_key(cache.keys, torch.from_numpy(centres).float() if centring else None)
        if plan.family == "vector":
            assert torch.equal(codes, expected)
            return codes.double().numpy(), None, centres
        if plan.family == "pq":
            assert (codes != expected).double().mean() <= 0.01
            return codes.numpy(), None, centres
        signs = slice(0, -1 if plan.family == "rabitq" else None)  # its last word holds two floats
        off = np.unpackbits(as_bytes(codes[..., signs]) ^ as_bytes(expected[..., signs]), axis=-1).sum(-1)
        away, size = (np.linalg.norm(x, axis=-1) for x in (held.keys - centres[:, :, None], held.keys))
        off = off[away > 1e-4 * size]  # of a key at its centre every bit is up to rounding
        assert off.size == 0 or off.mean() <= 0.01, f"codes differ from what encoding gives in {off.sum()} bits"
        norms = None
        if cache.with_norms:
            norms = cache.norms.double().numpy()
            exact = np.linalg.norm(held.keys - centres[:, :, None], axis=-1, keepdims=True)
            assert (np.abs(norms - exact) <= 2**-8 * exact + 1e-5).all()
        return as_bytes(codes), norms, centres

    def _normal(self, *shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator) + 0.3
        if self.plan.family == "pages":  # whose products are then exact, and so are their whole units
            drawn = (8 * drawn).round() / 8
        return drawn.to(self.plan.dtype)


OPERATIONS = ["append"] * 4 + [
    "crop",
    "crop",
    "reorder",
    "repeat",
    "select_rows",
    "set_start",
    "encode",
    "state",
    "copied",
]
OPERATIONS += ["pickled", "reset"]


def as_bytes(codes: torch.Tensor) -> Array:
    """int64 codes [..., W] as uint8 [..., 8 W]."""
    return np.ascontiguousarray(codes.numpy()).view(np.uint8)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_walks_agree_with_the_oracle(chunk):
    for seed in range(chunk * WALKS, (chunk + 1) * WALKS):
        Walk(seed).go()


def test_the_oracle_notices_a_wrong_key():
    walk = Walk(0)
    walk.append()
    walk.cache.keys[0, 0, -1] += 1
    with pytest.raises(AssertionError):
        walk.compare_contents()


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        Walk(number).go()
        print(f"walk {number} agrees")
