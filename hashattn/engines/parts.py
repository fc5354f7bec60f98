"""Whether parts fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hashattn.attend.base import Attend
from hashattn.core.naming import short
from hashattn.encoders.base import Encoder
from hashattn.index.base import Index
from hashattn.selectors.base import Selector

if TYPE_CHECKING:
    from hashattn.attention import HashAttention

ENGINES = ("auto", "dense", "reference", "cpu", "triton")
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


def check_composition(attn: HashAttention) -> None:
    """Raise TypeError for a part of the wrong kind, ValueError for parts that do not fit each other."""
    kinds = {"encoder": Encoder, "index": Index, "selector": Selector, "attend": Attend}
    for name, kind in kinds.items():
        part = getattr(attn, name)
        if not isinstance(part, kind) and not (part is None and name != "attend"):
            raise TypeError(f"{name} must be an instance of {kind.__name__}, got {short(part)}")
    if attn.engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {attn.engine!r}")
    if not isinstance(attn.dense_layers, tuple) or not all(type(i) is int for i in attn.dense_layers):
        raise TypeError(f"dense_layers must be a tuple of layer numbers, got {attn.dense_layers!r}")
    encoder, index, selector, attend = attn.encoder, attn.index, attn.selector, attn.attend
    if (encoder is None) != (index is None):
        present, missing = ("encoder", "an index") if index is None else ("index", "an encoder")
        fit = f"index={_holds(encoder.code)}" if encoder is not None else _accepted(index)
        raise ValueError(f"{present} {short(getattr(attn, present))} needs {missing} to go with it; {fit} would fit")
    if encoder is not None and index is not None and not index.accepts(encoder.code):
        raise ValueError(
            f"index {short(index)} cannot hold what encoder {short(encoder)} makes ({encoder.code} codes); "
            f"index={_holds(encoder.code)} would fit it, or {_accepted(index)} the index"
        )
    if encoder is not None and index is not None:
        reason = index.why_not(encoder.bits, encoder.query_bits, encoder.biased)
        if reason is not None:
            raise ValueError(f"index {short(index)} cannot hold what encoder {short(encoder)} makes: {reason}")
    if selector is None:
        if attend.needs_selection:
            raise ValueError(
                f"attend {short(attend)} needs a selector, such as TopK(share=0.05); DenseAttend() does without"
            )
        return
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
    if attend.code is not None and encoder is not None and encoder.biased:
        raise ValueError(
            f"attend {short(attend)} takes codes for angles, but a byte of those of {short(encoder)} is a bias; "
            "bias_bits=0 or attend=ExactAttend() would fit"
        )
    if attend.code is not None and encoder is not None and not encoder.angular:
        raise ValueError(
            f"attend {short(attend)} takes codes for angles, which those of {short(encoder)} do not tell; "
            "encoder=SimHash(bits=128) or attend=ExactAttend() would fit"
        )
    if attend.code is not None and (encoder is None or encoder.code != attend.code):
        raise ValueError(
            f"attend {short(attend)} reads {attend.code} codes, which encoder {short(encoder)} does not make; "
            f"{_MAKES[attend.code]} or attend=ExactAttend() would fit"
        )
    if encoder is not None and index is not None and (reason := selector.refuses(encoder, index, attend)):
        raise ValueError(f"selector {short(selector)} {reason}")


def _holds(code: str) -> str:
    return _FITS.get(code, f"one that accepts {code!r} codes")


def _accepted(index: Index | None) -> str:
    return next((made for code, made in _MAKES.items() if index is not None and index.accepts(code)), "another encoder")
