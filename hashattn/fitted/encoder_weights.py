"""Encoders as plain data: JSON that says how to make one, and the tensors to fill it with. Nothing is pickled."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.core.extras import loaded
from hashattn.core.model_facts import ModelFacts
from hashattn.core.tensor_files import Stored
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

DTYPES = {"float16": torch.float16, "float32": torch.float32}
NAMES = {"float16": "F16", "float32": "F32"}  # in files
GROUP = "hashattn.encoders"  # entry points: third parties' encoder classes by name
_OWN: dict[str, type[Encoder]] = {
    c.__name__: c for c in (AsymmetricHash, SymmetricHash, ITQ, L2ALSH, PCA, PQ, HeavyChannels, SimpleLSH, SpectralHash)
}
_LARGEST = 1 << 20  # that an argument of an encoder may be, the seed apart
_LONGEST = 64  # list of arguments


@dataclass(frozen=True)
class Weights:
    """Tensors of a part in a file: what the header says of each by name, and how all of them are read."""

    said: Mapping[str, Stored]
    read: Callable[[], dict[str, Tensor]]


def encoder_class(name: str) -> type[Encoder]:
    """A class by its name: one of the library's own, else an installed package's, from the entry points.

    Raises:
        ValueError: there is none, or it is no encoder with weights.
        ImportError: the package that has it cannot be imported.
    """
    if not isinstance(name, str):
        raise ValueError(f"an encoder's class must be a string, got {name!r:.100}")
    if name in _OWN:
        return _OWN[name]
    found = [e for e in entry_points(group=GROUP) if e.name == name]
    if not found:
        raise ValueError(
            f"encoder class {name!r:.100} is not known: the library's own are {', '.join(_OWN)}, and no installed "
            f"package has an entry point of this name in the group {GROUP}"
        )
    made = loaded(found[0])
    if not (isinstance(made, type) and issubclass(made, Encoder) and issubclass(made, nn.Module)):
        raise ValueError(f"the entry point {name!r} in {GROUP} is {made!r}, which is no encoder with weights")
    return made


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


def restore(description: Any, tensors: Weights, facts: ModelFacts) -> Encoder:
    """The encoder that describe() and tensors_of() were called with, tried on queries and keys of the model's shape.

    It is made on the meta device, and is given memory once its weights are of the names and shapes that it asks for.

    Args:
        description: its class and arguments.
        tensors: its weights: what the file's header says of them, and how to read them.
        facts: of the model.

    Raises:
        ValueError: an unknown class or argument, or weights of other names or shapes than these ask for.
        ImportError: an installed package's class that cannot be imported.
    """
    if not isinstance(description, Mapping) or set(description) != {"class", "arguments"}:
        raise ValueError(f"an encoder is described by its class and its arguments, got {description!r:.200}")
    made = encoder_class(description["class"])
    given = _arguments(made, description["arguments"])
    try:
        encoder = _blank(made, given, facts, "meta")
        if made not in _OWN.values():  # a constructor of others may do more than make weights
            compare(encoder, tensors.said)
            encoder = _blank(made, given, facts, "cpu")
        fill(encoder, tensors)
        encoder.check_model(facts.q_heads, facts.kv_heads, facts.head_dim)
        encoder.encode_key(torch.zeros(1, facts.kv_heads, 1, facts.head_dim))
        encoder.encode_query(torch.zeros(1, facts.q_heads, 1, facts.head_dim))
    except Exception as error:  # whatever a class says of arguments and weights that are not its own
        raise ValueError(f"no {made.__name__} for this model can be made of it: {error}") from error
    return encoder


def compare(part: nn.Module, said: Mapping[str, Stored]) -> None:
    """Compare the weights of a part, which may be on the meta device, with what the header of a file says.

    Raises:
        ValueError: missing or unknown names, other shapes or dtypes.
    """
    wanted = {**dict(part.named_parameters()), **dict(part.named_buffers())}  # shared weights once, as they are stored
    if wanted.keys() != said.keys():
        found = ", ".join(sorted(said)) or "none"
        raise ValueError(f"weights {', '.join(sorted(wanted))} were expected, got {found:.1000}")
    for name, there in said.items():
        shape = tuple(wanted[name].shape)
        if wanted[name].numel() and shape != there.shape:  # an empty buffer takes the shape it is given
            raise ValueError(f"{name} is {[*there.shape]}, but {[*shape]} was expected")
        if not math.prod(there.shape):
            raise ValueError(f"{name} is {[*there.shape]}: there is nothing in it")
        expected = [*NAMES.values()] if wanted[name].is_floating_point() else ["I64"]
        if there.dtype not in expected:
            raise ValueError(f"{name} is of {there.dtype}, but {' or '.join(expected)} was expected")


def fill(part: nn.Module, tensors: Weights) -> None:
    """Load what tensors_of() gave; everything is computed in float32.

    Raises:
        ValueError: what compare() refuses, or values that are not finite.
    """
    compare(part, tensors.said)
    held = tensors.read()
    for name, tensor in held.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    floats = {name: t.float() if t.is_floating_point() else t for name, t in held.items()}
    part.load_state_dict(floats, strict=False, assign=True)


def _blank(made: type[Encoder], given: Mapping[str, Any], facts: ModelFacts, device: str) -> Any:
    """An encoder that is not fitted, with room for what fit() makes."""
    with torch.device(device):
        encoder = made(**given)
        encoder.prepare(facts.kv_heads, facts.head_dim, torch.device(device))
    return encoder


def _arguments(made: type[Encoder], described: Any) -> dict[str, Any]:
    """The arguments of a class, each of the type that its default has. bool is no number."""
    if not isinstance(described, Mapping):
        raise ValueError(f"arguments of {made.__name__} must be an object, got {described!r:.100}")
    known = inspect.signature(made).parameters
    for name, value in described.items():
        if name not in known:
            raise ValueError(f"{made.__name__} takes no argument {name!r}; it takes {', '.join(known)}")
        parts = value if isinstance(value, list) else [value]
        default = known[name].default
        right = len(parts) <= _LONGEST and all(x is None or isinstance(x, int | float | str) for x in parts)
        if isinstance(default, bool):
            right = right and isinstance(value, bool)
        else:
            right = right and not any(isinstance(x, bool) for x in parts)
            if isinstance(default, int):
                right = right and isinstance(value, int)
            right = right and not any(isinstance(x, int) and abs(x) > _LARGEST for x in parts if name != "seed")
            right = right and (name != "seed" or (isinstance(value, int) and abs(value) < 1 << 63))
        if not right:
            raise ValueError(f"{made.__name__} takes no {name}={value!r:.100}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}


def _as_stored(tensor: Tensor, dtype: str) -> Tensor:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    tensor = tensor.detach()
    return tensor.to(DTYPES[dtype]) if tensor.is_floating_point() and tensor.ndim else tensor
