"""Encoders as plain data: JSON that says how to make one, and the tensors to fill it with. Nothing is pickled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.encoders import (
    ITQ,
    L2ALSH,
    PCA,
    PQ,
    AsymmetricHash,
    Encoder,
    HeavyChannels,
    SimpleLSH,
    SpectralHash,
    SymmetricHash,
)
from hashattn.facts import ModelFacts

DTYPES = {"float16": torch.float16, "float32": torch.float32}
GROUP = "hashattn.encoders"  # entry points: third parties' encoder classes by name
_OWN: dict[str, type[Encoder]] = {
    c.__name__: c for c in (AsymmetricHash, SymmetricHash, ITQ, L2ALSH, PCA, PQ, HeavyChannels, SimpleLSH, SpectralHash)
}


def encoder_class(name: str) -> type[Encoder]:
    """A class by its name: one of the library's own, else an installed package's, from the entry points.

    Raises:
        ValueError: there is none, or it is no encoder with weights.
    """
    if name in _OWN:
        return _OWN[name]
    found = [e for e in entry_points(group=GROUP) if e.name == name]
    if not found:
        raise ValueError(
            f"encoder class {name!r} is not known: the library's own are {', '.join(_OWN)}, and no installed package "
            f"has an entry point of this name in the group {GROUP}"
        )
    loaded = found[0].load()
    if not (isinstance(loaded, type) and issubclass(loaded, Encoder) and issubclass(loaded, nn.Module)):
        raise ValueError(f"the entry point {name!r} in {GROUP} is {loaded!r}, which is no encoder with weights")
    return loaded


def check_class(encoder: Encoder) -> None:
    """Raise ValueError if the encoder's class could not be found again by its name."""
    name = type(encoder).__name__
    if encoder_class(name) is not type(encoder):
        raise ValueError(f"encoder class {name!r} means another class when loaded: {encoder_class(name)!r}")


def reseeded(encoder: Encoder, seed: int) -> Encoder:
    """Another encoder with the same arguments, not fitted, that starts from this seed if it takes one."""
    arguments = {name: getattr(encoder, name) for name in inspect.signature(type(encoder)).parameters}
    return type(encoder)(**(arguments | ({"seed": seed} if "seed" in arguments else {})))


def describe(encoder: Encoder) -> dict[str, Any]:
    """Its class and the arguments that make another like it. An encoder keeps each argument under its own name.

    Raises:
        ValueError: it is not fitted, of a class that could not be found again, or an argument is no plain data.
    """
    name = type(encoder).__name__
    check_class(encoder)
    if not getattr(encoder, "fitted", True):
        raise ValueError(f"this {name} is not fitted: there is nothing to save yet; call fit() first")
    arguments = {}
    for argument in inspect.signature(type(encoder)).parameters:
        if argument == "centring":  # of rows while nothing is fitted
            continue
        value = getattr(encoder, argument)
        plain = list(value) if isinstance(value, tuple) else value
        if not all(x is None or isinstance(x, int | float | str) for x in (plain if type(plain) is list else [plain])):
            raise ValueError(f"argument {argument}={value!r} of {name} is no plain data")
        arguments[argument] = plain
    return {"class": name, "arguments": arguments}


def tensors_of(part: nn.Module, dtype: str = "float16") -> dict[str, Tensor]:
    """Its weights and buffers by name, on the CPU, each once; numbers stay float32.

    Raises:
        ValueError: values that are not finite, or that float16 cannot hold.
    """
    named = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    stored = {}
    for name, tensor in named.items():
        stored[name] = _as_stored(tensor, dtype).cpu().contiguous()
        if not stored[name].isfinite().all():
            cause = f"{dtype} cannot hold: use float32" if bool(tensor.isfinite().all()) else "are not finite"
            raise ValueError(f"{type(part).__name__}: {name} holds values that {cause}")
    return stored


@torch.no_grad()
def round_weights(part: nn.Module, dtype: str = "float16") -> None:
    """Round the weights to what is stored, in place: from then on the part does what its loaded copy will do."""
    for tensor in (*part.parameters(), *part.buffers()):
        tensor.copy_(_as_stored(tensor, dtype))
    if isinstance(part, Encoder):
        part.fits += 1  # caches encode anew


def restore(description: Any, tensors: Mapping[str, Tensor], facts: ModelFacts) -> Encoder:
    """The encoder that describe() and tensors_of() were called with, tried on queries and keys of the model's shape.

    Raises:
        ValueError: an unknown class or argument, or weights of other names or shapes than these ask for.
    """
    if not isinstance(description, Mapping) or set(description) != {"class", "arguments"}:
        raise ValueError(f"an encoder is described by its class and its arguments, got {description!r}")
    made = encoder_class(description["class"])
    try:
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in description["arguments"].items()}
        encoder: Any = made(**given)
        if hasattr(encoder, "build"):
            encoder.build(facts.head_dim)
        if encoder.biased and hasattr(encoder, "build_bias"):
            encoder.build_bias(encoder.code_heads(facts.kv_heads))
        fill(encoder, tensors)
        encoder.check_model(facts.q_heads, facts.kv_heads, facts.head_dim)
        encoder.encode_key(torch.zeros(1, facts.kv_heads, 1, facts.head_dim))
        encoder.encode_query(torch.zeros(1, facts.q_heads, 1, facts.head_dim))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"no {made.__name__} for this model can be made of it: {error}") from error
    return encoder


def fill(part: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what tensors_of() gave; everything is computed in float32.

    Raises:
        ValueError: missing or unknown names, other shapes, values that are not finite.
    """
    wanted = {**dict(part.named_parameters()), **dict(part.named_buffers())}  # shared weights once, as they are stored
    if wanted.keys() != tensors.keys():
        found = ", ".join(sorted(tensors)) or "none"
        raise ValueError(f"weights {', '.join(sorted(wanted))} were expected, got {found}")
    for name, tensor in tensors.items():
        if wanted[name].numel() and wanted[name].shape != tensor.shape:  # an empty buffer takes the shape it is given
            raise ValueError(f"{name} is {[*tensor.shape]}, but {[*wanted[name].shape]} was expected")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    held = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    part.load_state_dict(held, strict=False)


def _as_stored(tensor: Tensor, dtype: str) -> Tensor:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    tensor = tensor.detach()
    return tensor.to(DTYPES[dtype]) if tensor.is_floating_point() and tensor.ndim else tensor
