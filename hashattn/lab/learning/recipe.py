"""Recipe: which encoder is fitted, and how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from hashattn.attention import HashAttention
from hashattn.core.budget import check_share
from hashattn.encoders import ITQ, AsymmetricHash, Encoder, SymmetricHash
from hashattn.encoders.losses import parse
from hashattn.fitted import encoder_weights
from hashattn.index import FlatHamming
from hashattn.presets import build
from hashattn.presets.parsing import parse as parse_preset
from hashattn.selectors import TopK

ENCODERS = ("asymmetric", "symmetric", "itq")
HEADS = ("shared", "kv")
SHAPE = ("encoder", "bits", "bias_bits", "query_hidden", "query_bits", "heads")  # what a preset says by itself
HOW = ("loss", "steps", "queries", "lr", "temperature", "every")  # a learned one is fitted
SEEDS = 10_000  # layers have seeds of their own: two recipes that differ in their seed share none


@dataclass(frozen=True)
class Recipe:
    """What is asked of a fit.

    Attributes:
        preset: fit the encoder of this preset, written "name" or "name:option=value,..."; the six below are then left
            out. None for an encoder by itself.
        encoder: "asymmetric", "symmetric" or "itq" (which takes only bits, query_bits, seed and budget).
        bits: length of a code.
        bias_bits: 8 gives the last byte of a code to a scalar of each key; 0 for none. Not for itq.
        query_hidden: widths of the query MLP, () for a linear query; None is the encoder's own. Asymmetric only.
        query_bits: bit planes of a query.
        heads: "shared" for one set of weights a layer, "kv" for one a KV head.
        loss: terms by name, such as "ranking" or "kl + 0.1 * balance".
        steps: of Adam, at most.
        queries: drawn at each step.
        lr: peak learning rate.
        temperature: of the teacher's softmax.
        seed: of weights and draws; each layer takes its own from it.
        every: steps between two looks at the held-out sequences.
        patience: looks without a better recall after which a layer stops; 0 never stops early.
        held_out: share of the sequences of each kind, the last ones, that are never fitted to; at least one in all.
        budget: share of the keys that recall and mass are taken at.

    Raises:
        ValueError: a value that cannot be used, or that the encoder does not take; a preset with nothing to fit.
        TypeError: an option that the preset does not take.
    """

    preset: str | None = None
    encoder: str = "asymmetric"
    bits: int = 128
    bias_bits: int = 0
    query_hidden: tuple[int, ...] | None = None
    query_bits: int = 1
    heads: str = "shared"
    loss: str = "ranking"
    steps: int = 1000
    queries: int = 64
    lr: float = 3e-3
    temperature: float = 2.0
    seed: int = 0
    every: int = 50
    patience: int = 8
    held_out: float = 0.15
    budget: float = 0.05

    def __post_init__(self) -> None:
        for name, value, known in (("encoder", self.encoder, ENCODERS), ("heads", self.heads, HEADS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.encoder != "asymmetric" and self.query_hidden is not None:
            raise ValueError(f"query_hidden is the asymmetric encoder's, not the {self.encoder} one's")
        if self.encoder == "itq" and self.bias_bits:
            raise ValueError(f"bias_bits={self.bias_bits}: itq learns no bias; leave it out")
        if self.encoder == "itq" and self.heads == "kv":
            raise ValueError("heads='kv': itq has a rotation for each KV head as it is; leave it out")
        parse(self.loss)
        for name, least in (("steps", 1), ("queries", 1), ("every", 1), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        check_share("held_out", self.held_out)
        check_share("budget", self.budget)
        if self.held_out == 1:
            raise ValueError("held_out=1 leaves nothing to fit to")
        if self.preset is not None:
            self._check_preset()
        self.make(0, 1)

    def _check_preset(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if f.name in SHAPE and getattr(self, f.name) != f.default]
        if given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r}: preset={self.preset!r} says what its encoder is; give an "
                "option of the preset instead, if it has one"
            )
        if "pretrained" in parse_preset(str(self.preset))[1]:
            raise ValueError(f"preset={self.preset!r} is fitted already: leave pretrained out")
        encoder = self.composition().encoder
        if not isinstance(encoder, nn.Module) or not hasattr(encoder, "fit"):
            named = "none" if encoder is None else type(encoder).__name__
            raise ValueError(f"preset={self.preset!r} has nothing to fit: its encoder is {named}")
        encoder_weights.check_class(encoder)

    def composition(self) -> HashAttention:
        """The preset's, or one that holds the encoder of layer 0 with the index for its codes."""
        if self.preset is None:
            return HashAttention(self.make(0, 1), FlatHamming(), TopK(share=self.budget))
        name, options = parse_preset(self.preset)
        return build(name, **options)

    def make(self, layer: int, kv_heads: int) -> Encoder:
        """A new encoder for a layer.

        Raises:
            ValueError: what the encoder itself refuses.
        """
        seed, heads = self.seed * SEEDS + layer, kv_heads if self.heads == "kv" else None
        if self.preset is not None:
            encoder = self.composition().encoder
            assert encoder is not None
            return encoder_weights.reseeded(encoder, seed)
        if self.encoder == "itq":
            return ITQ(self.bits, query_bits=self.query_bits, seed=seed)
        if self.encoder == "symmetric":
            return SymmetricHash(
                self.bits, query_bits=self.query_bits, heads=heads, seed=seed, bias_bits=self.bias_bits
            )
        hidden: dict[str, Any] = {} if self.query_hidden is None else {"query_hidden": self.query_hidden}
        return AsymmetricHash(
            self.bits, query_bits=self.query_bits, heads=heads, seed=seed, bias_bits=self.bias_bits, **hidden
        )

    def as_json(self) -> dict[str, Any]:
        """The same as plain types."""
        hidden = None if self.query_hidden is None else list(self.query_hidden)
        return dataclasses.asdict(self) | {"query_hidden": hidden}
