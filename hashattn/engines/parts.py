"""Parts: what a step is composed of, and whether these fit together."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.attend.base import Attend
from hashattn.cache.kv_cache import KVCache
from hashattn.core.naming import short
from hashattn.encoders.base import Encoder
from hashattn.index.base import Index
from hashattn.selectors.base import Selector

_FITS = {
    "binary": "FlatHamming()",
    "buckets": "FlatBuckets()",
    "pq": "FlatPQ()",
    "rabitq": "FlatRaBitQ()",
    "vector": "FlatDot()",
}
_MAKES = {
    "binary": "a binary encoder such as SimHash(bits=128)",
    "buckets": "CrossPolytope()",
    "pq": "PQ(16)",
    "rabitq": "RaBitQ()",
    "vector": "Identity()",
}


@dataclass(frozen=True)
class Parts:
    """Encoder, index, selector and attend stage: what an engine needs of a composition.

    Raises:
        TypeError: a part of the wrong kind.
        ValueError: parts that do not fit each other; the message names both and what would fit.
    """

    encoder: Encoder | None
    index: Index | None
    selector: Selector | None
    attend: Attend

    def __post_init__(self) -> None:
        kinds = {"encoder": Encoder, "index": Index, "selector": Selector, "attend": Attend}
        for name, kind in kinds.items():
            part = getattr(self, name)
            if not isinstance(part, kind) and not (part is None and name != "attend"):
                raise TypeError(f"{name} must be an instance of {kind.__name__}, got {short(part)}")
        _check_codes(self.encoder, self.index)
        if self.selector is None:
            if self.attend.needs_selection:
                fit = "such as TopK(share=0.05); DenseAttend() does without"
                raise ValueError(f"attend {short(self.attend)} needs a selector, {fit}")
            return
        _check_selector(self.selector, self.encoder, self.index, self.attend)
        _check_estimates(self.encoder, self.attend)
        if self.encoder is not None and self.index is not None:
            reason = self.selector.refuses(self.encoder, self.index, self.attend)
            if reason is not None:
                raise ValueError(f"selector {short(self.selector)} {reason}")

    @property
    def searches(self) -> bool:
        """Whether it selects keys at all."""
        return self.attend.needs_selection

    @property
    def ranks(self) -> bool:
        """Whether it selects by the codes of an index."""
        return self.selector is not None and self.selector.ranked and self.encoder is not None

    def warmup(self, cache: KVCache) -> int:
        """Visible keys that a row of the cache needs before it is searched; what ranks nothing needs no centre."""
        return cache.warmup if self.encoder is not None else 0

    def check_cache(self, cache: KVCache) -> None:
        """Raise ValueError unless the cache was made by a composition with the same encoder, index and norms."""
        if self.encoder is None:  # keys and values are all it reads
            return
        for name, own, held in (
            ("encoder", self.encoder, cache.encoder),
            ("index", self.index, cache.index),
            ("norms", self.attend.needs_norms, cache.with_norms),
        ):
            if own != held and (name != "norms" or own):
                raise ValueError(
                    f"this cache is of another composition: its {name} is {short(held)}, here it is {short(own)}"
                )

    def can_search(self, cache: KVCache) -> bool:
        """Whether any row of the cache holds keys enough."""
        return cache.longest > 0 and (not self.warmup(cache) or any(cache.ready))


def _check_codes(encoder: Encoder | None, index: Index | None) -> None:
    if encoder is not None and index is not None:
        if not index.accepts(encoder.code):
            raise ValueError(
                f"index {short(index)} cannot hold what encoder {short(encoder)} makes ({encoder.code} codes); "
                f"index={_holds(encoder.code)} would fit it, or {_accepted(index)} the index"
            )
        reason = index.why_not(encoder.bits, encoder.query_bits, encoder.biased)
        if reason is not None:
            raise ValueError(f"index {short(index)} cannot hold what encoder {short(encoder)} makes: {reason}")
    elif encoder is not None:
        raise ValueError(
            f"encoder {short(encoder)} needs an index to go with it; index={_holds(encoder.code)} would fit"
        )
    elif index is not None:
        raise ValueError(f"index {short(index)} needs an encoder to go with it; {_accepted(index)} would fit")


def _check_selector(selector: Selector, encoder: Encoder | None, index: Index | None, attend: Attend) -> None:
    if not attend.needs_selection:
        raise ValueError(
            f"attend {short(attend)} reads every key, so selector {short(selector)} would do nothing; leave it out"
        )
    if selector.ranked and encoder is None:
        raise ValueError(
            f"selector {short(selector)} ranks keys by distance, which needs an encoder and an index; "
            "encoder=SimHash(bits=128), index=FlatHamming() would fit"
        )
    if index is not None and selector.ranked and selector.needs_distances and not index.scans:
        raise ValueError(
            f"selector {short(selector)} asks for the distance to every key, but index {short(index)} only searches; "
            "a selector such as TopK(share=0.05) or index=FlatHamming() would fit"
        )


def _check_estimates(encoder: Encoder | None, attend: Attend) -> None:
    """Whether the attend stage can read such codes, if it reads any."""
    if attend.code is None:
        return
    if encoder is not None and encoder.biased:
        raise ValueError(
            f"attend {short(attend)} takes codes for angles, but a byte of those of {short(encoder)} is a bias; "
            "bias_bits=0 or attend=ExactAttend() would fit"
        )
    if encoder is not None and not encoder.angular:
        raise ValueError(
            f"attend {short(attend)} takes codes for angles, which those of {short(encoder)} do not tell; "
            "encoder=SimHash(bits=128) or attend=ExactAttend() would fit"
        )
    if encoder is None or encoder.code != attend.code:
        raise ValueError(
            f"attend {short(attend)} reads {attend.code} codes, which encoder {short(encoder)} does not make; "
            f"{_MAKES[attend.code]} or attend=ExactAttend() would fit"
        )


def _holds(code: str) -> str:
    return _FITS.get(code, f"one that accepts {code!r} codes")


def _accepted(index: Index | None) -> str:
    return next((made for code, made in _MAKES.items() if index is not None and index.accepts(code)), "another encoder")
