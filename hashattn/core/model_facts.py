"""ModelFacts: what of a model its queries and keys depend on, as far as an encoder is concerned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hashattn.core.json_files import whole_number

# Of files: more than any model has, and little enough to try an encoder on such heads.
_COUNTS = {
    "layers": (1, 10_000),
    "q_heads": (1, 1024),
    "kv_heads": (1, 1024),
    "head_dim": (1, 4096),
    "vocab_size": (0, 1 << 31),
}


@dataclass(frozen=True)
class ModelFacts:
    """The model that queries and keys came from. Plain data: reading it back needs no transformers.

    Attributes:
        name: for people; two names of one model do not make it two.
        model_type: as in the model's config, such as "llama".
        layers: all decoder layers.
        attention_layers: numbers of those of full attention, which can be searched.
        q_heads, kv_heads, head_dim: Hq, Hkv and D of these.
        rope: the config's rope_parameters; None where there are none.
        vocab_size: of the tokenizer's model; not compared, since embeddings may be resized.
    """

    name: str
    model_type: str
    layers: int
    attention_layers: tuple[int, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    rope: dict[str, Any] | None = None
    vocab_size: int = 0

    def as_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return dataclasses.asdict(self) | {"attention_layers": list(self.attention_layers)}

    @classmethod
    def from_json(cls, data: Any) -> ModelFacts:
        """What as_json() wrote.

        Raises:
            ValueError: a field is missing, unknown, of another type or out of its range.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or set(data) != fields:
            found = sorted(data) if isinstance(data, Mapping) else data
            raise ValueError(f"model facts must have the fields {', '.join(sorted(fields))}, got {found}")
        for name in ("name", "model_type"):
            if not isinstance(data[name], str):
                raise ValueError(f"model facts: {name} must be a string, got {data[name]!r}")
        for name, (least, most) in _COUNTS.items():
            if not whole_number(data[name], least, most):
                raise ValueError(f"model facts: {name} must be a number from {least} to {most}, got {data[name]!r:.99}")
        if data["q_heads"] % data["kv_heads"]:
            raise ValueError(
                f"model facts: q_heads must be a multiple of kv_heads, got {data['q_heads']} and {data['kv_heads']}"
            )
        attention, rope = data["attention_layers"], data["rope"]
        if (
            not isinstance(attention, list)
            or not all(whole_number(i, 0, data["layers"] - 1) for i in attention)
            or len(set(attention)) != len(attention)
        ):
            raise ValueError(
                f"model facts: attention_layers must be layers of {data['layers']}, got {attention!r:.100}"
            )
        if rope is not None and not isinstance(rope, Mapping):
            raise ValueError(f"model facts: rope must be an object or null, got {rope!r}")
        return cls(**{**data, "attention_layers": tuple(attention), "rope": None if rope is None else dict(rope)})

    def differences(self, other: ModelFacts) -> list[str]:
        """Why encoders of this model do not suit another: "kv_heads is 3 here and 8 there". Names may differ."""
        compared = [f.name for f in dataclasses.fields(self) if f.name not in ("name", "vocab_size")]
        return [
            f"{name} is {getattr(self, name)!r} here and {getattr(other, name)!r} there"
            for name in compared
            if getattr(self, name) != getattr(other, name)
        ]
