"""What every encoder promises."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hashattn.attention import HashAttention
from hashattn.core.model_facts import ModelFacts
from hashattn.encoders import Encoder, PerLayer
from hashattn.fitted import encoder_weights
from hashattn.fitted.saving import from_pretrained, save_pretrained
from hashattn.index import FlatBuckets, FlatDot, FlatHamming, FlatPQ, FlatRaBitQ, Index
from hashattn.selectors import Recent, Sink, TopK
from hashattn.testing.attention import check_attention, close_codes
from hashattn.testing.inputs import DTYPES, Inputs, Shape, inputs
from hashattn.testing.promise import check_description, promise

INDEXES: dict[str, Index] = {
    "binary": FlatHamming(),
    "buckets": FlatBuckets(),
    "pq": FlatPQ(),
    "rabitq": FlatRaBitQ(),
    "vector": FlatDot(),
}


def check_encoder(encoder: Encoder, *, index: Index | None = None, shape: Shape | None = None) -> None:
    """A key's code depends on that key and its centre alone, has the size that it is said to have, and can be stored.

    Args:
        encoder: of one layer; fitted to keys of this shape if it is to be.
        index: that holds its codes; by default the flat one for their kind.
        shape: of the inputs.

    Raises:
        AssertionError: it breaks a promise.
    """
    promise(isinstance(encoder, Encoder), encoder, "it is a hashattn.Encoder")
    shape = shape or Shape()
    check_description(encoder)
    promise(isinstance(encoder.layer(0), Encoder), encoder, "layer(i) is an encoder")
    if index is None:
        promise(encoder.code in INDEXES, encoder, f"codes of kind {encoder.code!r} have an index: give index=...")
        index = INDEXES[encoder.code]
    attn = HashAttention(encoder, index, Sink(2) | Recent(4) | TopK(k=12), engine="reference")
    data = inputs(shape, attn)
    _check_codes(encoder, data)
    _check_alone(encoder, data)
    for dtype in DTYPES[1:]:
        _check_codes(encoder, inputs(shape, attn, dtype=dtype))
    if isinstance(encoder, nn.Module):
        _check_weights(encoder, data)
    check_attention(attn, shape=shape, part=encoder)


def _check_codes(encoder: Encoder, data: Inputs) -> None:
    k, q, code = data.k, data.q, encoder.code
    codes, query = encoder.encode_key(k), encoder.encode_query(q)
    heads = encoder.code_heads(k.shape[1])
    promise(codes.shape[:3] == (2, heads, k.shape[2]), encoder, f"codes are [B, {heads}, N, W], got {[*codes.shape]}")
    promise(query.shape[:3] == q.shape[:3], encoder, f"queries become [B, Hq, T, ...], got {[*query.shape]}")
    promise(codes.device == k.device and query.device == q.device, encoder, "codes are where the keys are")
    size, said = codes.shape[-1] * codes.element_size(), encoder.code_bytes(k.shape[3], k.element_size())
    promise(size == said, encoder, f"a code takes the code_bytes() of {said}, got {size}")
    if code == "binary":
        planes = 1 if query.ndim == 4 else query.shape[3]
        promise(codes.dtype == query.dtype == torch.int64, encoder, f"codes are int64, got {codes.dtype}")
        promise(query.shape[-1] == codes.shape[-1], encoder, "queries and keys have codes of as many words")
        promise(planes == encoder.query_bits, encoder, f"queries have query_bits={encoder.query_bits} planes")
    if not codes.is_floating_point():
        same = close_codes(codes, encoder.encode_key(k.float()), code)
        promise(same, encoder, f"keys of {k.dtype} have the codes of the same keys in float32")


def _check_alone(encoder: Encoder, data: Inputs) -> None:
    k, q, code = data.k, data.q, encoder.code
    centre = k[:, :, :20].float().mean(2)
    for given in (None, centre):
        whole = encoder.encode_key(k, given)
        promise(torch.equal(whole, encoder.encode_key(k, given)), encoder, "the same keys have the same codes")
        parts = torch.cat([encoder.encode_key(part, given) for part in k.split((40, 1, k.shape[2] - 41), 2)], 2)
        promise(close_codes(parts, whole, code), encoder, "a key's code does not depend on the keys beside it")
        flipped = encoder.encode_key(k.flip(0), None if given is None else given.flip(0)).flip(0)
        promise(close_codes(flipped, whole, code), encoder, "a key's code does not depend on the other rows")
    if encoder.centring is not None:
        moved = encoder.encode_key(k + centre.unsqueeze(2), centre)
        same = close_codes(moved, encoder.encode_key(k), code)
        promise(same, encoder, "the centre is subtracted from the keys: codes of k + c with centre c are those of k")
    one = torch.cat([encoder.encode_query(part) for part in q.split(1, 2)], 2)
    kind = code if not one.is_floating_point() else "vector"
    promise(close_codes(one, encoder.encode_query(q), kind), encoder, "a query's code does not depend on the others")


def _check_weights(encoder: Encoder, data: Inputs) -> None:
    assert isinstance(encoder, nn.Module)
    name, made = type(encoder).__name__, type(encoder)
    arguments = [a for a in inspect.signature(made).parameters if a != "centring"]
    missing = [a for a in arguments if not hasattr(encoder, a)]
    promise(not missing, encoder, f"each argument is kept under its own name, but {', '.join(missing)} is not")
    twin = made(**{a: getattr(encoder, a) for a in arguments})
    assert isinstance(twin, Encoder) and isinstance(twin, nn.Module)
    if not getattr(twin, "fitted", True):
        promise(_says_so(twin, data.k), encoder, "an unfitted encoder refuses keys with a RuntimeError, or warns")
        refuses = _refuses(lambda: twin.encode_key(data.k))
        promise(_refuses(twin.check_fitted) == refuses, encoder, "check_fitted() raises where encode_key() does")
    before = twin.fits
    twin.to(data.k.device).load_state_dict(encoder.state_dict(), strict=hasattr(twin, "fitted"))
    promise(twin.fits > before, encoder, "loading weights counts in `fits`, so that caches encode anew")
    _check_same(encoder, twin, data, "a state_dict that is loaded makes the same codes")
    try:
        known = encoder_weights.encoder_class(name) is made
    except ValueError:  # no entry point: it is not meant to be saved
        return
    promise(known, encoder, f"the class that is loaded by the name {name!r} is its own")
    facts = ModelFacts("contract", "llama", 1, (0,), data.q.shape[1], data.k.shape[1], data.k.shape[3])
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(PerLayer({0: encoder}, facts), Path(folder) / "saved", dtype="float32")
        loaded = from_pretrained(Path(folder) / "saved").encoder.layer(0)
    assert isinstance(loaded, nn.Module)
    loaded.to(data.k.device)
    _check_same(encoder, loaded, data, "save_pretrained() and from_pretrained() make the same codes")


def _says_so(encoder: Encoder, k: Tensor) -> bool:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return _refuses(lambda: encoder.encode_key(k)) or bool(told)


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except RuntimeError:
        return True
    return False


def _check_same(encoder: Encoder, other: Encoder, data: Inputs, words: str) -> None:
    promise(torch.equal(other.encode_key(data.k), encoder.encode_key(data.k)), encoder, words)
    promise(torch.equal(other.encode_query(data.q), encoder.encode_query(data.q)), encoder, words)
