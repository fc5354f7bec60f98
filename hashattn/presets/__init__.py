"""Presets: published methods as compositions, one short function each.

Defaults are published values where the docstring does not say otherwise; what a paper leaves to calibration is an
argument. Where readings of a paper differ, or a paper and its authors' code, the docstring says so. Installed packages
add presets of their own in the entry point group ``hashattn.presets``: functions with keyword options that return a
HashAttention.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from hashattn.attention import HashAttention
from hashattn.core.extras import loaded
from hashattn.fitted.for_presets import fitted
from hashattn.fitted.saving import Pretrained
from hashattn.presets.budgets import full, h2o, oracle_topk, pyramidkv, snapkv, streaming, twilight, vattention
from hashattn.presets.dashkv import (
    dashkv,
    dashkv_consensus,
    dashkv_fast,
    dashkv_hash_only,
    dashkv_momentum,
    dashkv_symmetric,
)
from hashattn.presets.hashes import (
    alsh,
    hashattention,
    hata,
    itq,
    magicpig,
    reformer,
    simhash_topk,
    spectral,
    spotlight,
)
from hashattn.presets.scores import (
    double_sparsity,
    faiss_hnsw,
    faiss_ivf,
    loki,
    pqcache,
    quest,
    rabitq,
    sparq,
)

__all__ = ["GROUP", "PRESETS", "budget_options", "build", "names", "options_of", "preset", "takes_budget"]

GROUP = "hashattn.presets"
Preset = Callable[..., HashAttention]

PRESETS: dict[str, Preset] = {
    each.__name__: each
    for each in (
        dashkv, dashkv_hash_only, dashkv_consensus, dashkv_momentum, dashkv_symmetric, dashkv_fast, hata, hashattention,
        spotlight, simhash_topk, itq, spectral, alsh, reformer, magicpig, pqcache, rabitq, quest, loki, sparq,
        double_sparsity, faiss_hnsw, faiss_ivf, twilight, vattention, streaming, h2o, snapkv, pyramidkv, oracle_topk,
        full,
    )
}  # fmt: skip


def preset(name: str) -> Preset:
    """The function of this name: one of the library's own, else an installed package's.

    Raises:
        ValueError: there is none.
        ImportError: an installed package offers it, but it cannot be imported; the package is named.
        TypeError: what it offers is no function with keyword options.
    """
    if name in PRESETS:
        return PRESETS[name]
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name in others:
        return _installed(others[name])
    known = (*PRESETS, *others)
    raise ValueError(f"unknown preset {name!r}{_nearest(name, known)}; the presets are {', '.join(known)}")


def names() -> dict[str, str]:
    """The package of each preset, by the preset's name: the library's own first, then those of installed packages."""
    others = {
        point.name: point.dist.name if point.dist is not None else point.value.partition(":")[0]
        for point in entry_points(group=GROUP)
    }
    return {**dict.fromkeys(PRESETS, "hashattn"), **{name: p for name, p in others.items() if name not in PRESETS}}


def build(name: str, *, pretrained: str | Path | Pretrained | None = None, **options: Any) -> HashAttention:
    """The preset of this name, with fitted encoders if asked for; see :meth:`HashAttention.from_preset`."""
    known = options_of(name)
    floor = options.pop("min_k") if "min_k" in options and "min_k" not in known else None
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            near = _nearest(option, (*known, "min_k", "pretrained"))
            raise TypeError(f"preset {name!r} takes no option {option!r}{near}; {takes}")
    attn = _made(name, preset(name), options)
    attn = attn if pretrained is None else fitted(name, attn, pretrained, options)
    return attn if floor is None else _with_floor(name, attn, floor)


def options_of(name: str) -> dict[str, Any]:
    """The options of a preset and their defaults (the published hyperparameters).

    Raises:
        ValueError: an unknown preset.
    """
    return {p.name: p.default for p in inspect.signature(preset(name)).parameters.values()}


def budget_options(
    name: str, budget: float | None, tokens: int, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The options that give a preset this share of `tokens` keys, forced ones included; none for None.

    Args:
        name: of the preset.
        budget: above 0 and at most 1.
        tokens: keys, for presets that count them.
        given: options that the preset will get as well.

    Raises:
        ValueError: an unknown preset, a budget out of (0, 1], or a preset without one.
    """
    attn = build(name)
    if budget is None:
        return {}
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be a share above 0 and at most 1, got {budget}")
    options = {**options_of(name), **(given or {})}
    if "t2" in options:
        return {"t1": budget / 2, "t2": budget}
    if "tail" in options:
        return {"share": budget / 2, "tail": budget / 2}
    if "share" in options:
        return {"share": budget}
    keys = math.ceil(budget * tokens)
    if "k" in options:
        own = {option: value for option, value in (given or {}).items() if option != "min_k"}  # a floor is no budget
        selector = build(name, **{**own, "k": keys}).selector
        assert selector is not None
        return {"k": max(1, 2 * keys - selector.budget(tokens))}  # some count forced keys beside k, some within it
    if "recent" in options and attn.selector is not None and not attn.selector.ranked:
        return {"recent": max(1, keys - options["sinks"])}
    raise ValueError(f"preset {name!r} takes no budget: what it reads is not a share that can be given")


def takes_budget(name: str, given: Mapping[str, Any] | None = None) -> bool:
    """Whether a preset can be given a share of the keys; ValueError for an unknown one."""
    options_of(name)
    try:
        budget_options(name, 0.5, 4096, given)
    except ValueError:
        return False
    return True


def _installed(point: EntryPoint) -> Preset:
    """A preset of an installed package."""
    found = loaded(point)
    try:
        usable = callable(found) and not isinstance(found, type) and inspect.signature(found) is not None
    except (ValueError, TypeError):  # some callables have no signature
        usable = False
    if not usable:
        raise TypeError(
            f"{_offers(point)} is {found!r:.100}, which is no preset: a function with keyword options that returns a "
            "HashAttention is"
        )
    return cast(Preset, found)


def _made(name: str, made: Preset, options: Mapping[str, Any]) -> HashAttention:
    """What a preset makes. An installed package's is named if it fails."""
    if name in PRESETS:
        return made(**options)
    offered = _offers(next(p for p in entry_points(group=GROUP) if p.name == name))
    try:
        attn = made(**options)
    except TypeError as error:
        raise TypeError(f"{offered}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{offered}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{offered} fails: {type(error).__name__}: {error}") from error
    if not isinstance(attn, HashAttention):
        raise TypeError(f"{offered} returns {attn!r:.100}, which is no HashAttention")
    return attn


def _with_floor(name: str, attn: HashAttention, min_k: int) -> HashAttention:
    """The same with a floor beyond the forced keys."""
    if attn.selector is None or "min_k" not in attn.selector.settings():
        raise TypeError(f"preset {name!r} takes no option 'min_k': what it keeps has no floor beyond forced keys")
    return attn.replace(selector=attn.selector.revised(min_k=min_k))


def _offers(point: EntryPoint) -> str:
    package = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return f"preset {point.name!r}{package} ({point.value})"


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
