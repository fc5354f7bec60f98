"""What every preset promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hashattn.attention import HashAttention
from hashattn.testing.attention import check_attention
from hashattn.testing.inputs import Shape, inputs
from hashattn.testing.promise import promise


def check_preset(
    preset: Callable[..., HashAttention],
    *,
    fitting: Mapping[str, Any] | None = None,
    shape: Shape | None = None,
    **options: Any,
) -> HashAttention:
    """It is a documented function of keyword arguments that makes a composition, which keeps the promises of all.

    An encoder that learns is fitted to random keys first, where it is not fitted.

    Args:
        preset: the function.
        fitting: options of fit(), such as steps=2.
        shape: of the inputs.
        options: for the preset, as small as the inputs are.

    Returns:
        the composition.

    Raises:
        AssertionError: it breaks a promise.
    """
    shape = shape or Shape()
    promise(bool(preset.__doc__), preset, "it has a docstring with the source of the method")
    for p in inspect.signature(preset).parameters.values():
        plain = p.kind is p.KEYWORD_ONLY and p.default is not p.empty
        promise(plain, preset, f"every option is keyword-only and has a default, but {p.name} is not or has none")
    first, attn = preset(**options), preset(**options)
    promise(isinstance(first, HashAttention), preset, f"it makes a HashAttention, got {type(first).__name__}")
    promise(type(first.encoder) is type(attn.encoder) and first.engine == attn.engine, preset, "two calls agree")
    encoder: Any = attn.encoder
    if encoder is not None and hasattr(encoder, "fit") and not encoder.fitted:
        data = inputs(shape, attn, tokens=64, seed=1)
        encoder.fit(data.q, data.k, **(fitting or {}))
    check_attention(attn, shape=shape, part=preset)
    return attn
