"""What is measured: shapes, numbers of keys, budgets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ("32/8x128:float32", "32/8x128:bfloat16", "9/3x64:float32")
PER = ("query_head", "kv_head")  # who chooses keys: each head, or the heads of a group together
KEYS = ((4096, 256), (16384, 256), (65536, 1024), (262144, 1024))
AUTO_KEYS = tuple((n, 256) for n in (128, 256, 512, 1024, 2048, 4096, 8192))
CUDA_SHAPES = ("32/8x128:bfloat16",)
_ONE = ((8192, 256), (32768, 256), (131072, 256), (131072, 1024), (524288, 1024))
_EIGHT = ((32768, 1024), (131072, 1024))
CUDA_KEYS = (*((1, *size) for size in _ONE), *((8, *size) for size in _EIGHT))  # batch, keys, k


@dataclass(frozen=True)
class Settings:
    """How the cases of a fused step are measured.

    Attributes:
        bits: of the codes.
        pers: of PER, each of which is measured.
        clustered: all near keys in one sixty-fourth of the tokens.
        rounds: of which medians are taken.
    """

    bits: int = 64
    pers: Sequence[str] = PER
    clustered: bool = False
    rounds: int = 11


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: a decode step of one layer."""

    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    keys: int
    k: int
    threads: int = 1
    batch: int = 1

    @property
    def shape(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}x{self.head_dim}:{self.dtype}"

    def described(self, per: str, bits: int) -> dict[str, Any]:
        """What a row of results says of it, with who chooses and the bits of the codes."""
        sizes = {"shape": self.shape, "batch": self.batch, "keys": self.keys, "k": self.k}
        return sizes | {"per": per, "bits": bits}

    @property
    def dense_bytes(self) -> int:
        """Read by full attention."""
        return 2 * self.batch * self.kv_heads * self.keys * self.head_dim * DTYPES[self.dtype].itemsize


def parse_shape(text: str) -> tuple[int, int, int, str]:
    """(q_heads, kv_heads, head_dim, dtype) of "32/8x128:float32".

    Raises:
        ValueError: another form, an unknown dtype, or q_heads that is no multiple of kv_heads.
    """
    found = re.fullmatch(r"(\d+)/(\d+)x(\d+):(\w+)", text)
    if found is None:
        raise ValueError(
            f"--shape must look like 32/8x128:float32 (query heads/KV heads x head_dim:dtype), got {text!r}"
        )
    q_heads, kv_heads, head_dim = (int(n) for n in found.groups()[:3])
    if min(q_heads, kv_heads, head_dim) < 1 or q_heads % kv_heads:
        raise ValueError(f"--shape needs query heads that are a multiple of the KV heads, got {text!r}")
    if found[4] not in DTYPES:
        raise ValueError(f"--shape must end in one of {', '.join(DTYPES)}, got {text!r}")
    return q_heads, kv_heads, head_dim, found[4]


def parse_keys(text: str) -> tuple[int, int]:
    """(keys, k) of "4096:256".

    Raises:
        ValueError: another form, or more kept keys than there are.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[2]) <= int(found[1]):
        raise ValueError(f"--keys must look like 4096:256 (keys:kept, at least 1 and at most all), got {text!r}")
    return int(found[1]), int(found[2])
