"""Codes of queries and keys: a linear map, and signs packed into words."""

from __future__ import annotations

from typing import Any

import numpy as np

from hashattn.ops.compiled.jit import exactly, inlined


@inlined
def project(x: Any, linear: Any, bits: int, out: Any) -> None:
    """x @ linear, float32 [D], [D * bits], to [bits]."""
    out[:bits] = np.float32(0)
    for d in range(len(x)):
        row, z = linear[d * bits : (d + 1) * bits], x[d]
        for j in range(bits):
            out[j] += z * row[j]


@exactly
def pack(projected: Any, bits: int, planes: int, words: int, out: Any) -> None:
    """Bit planes of a projection, as ops.hamming.reference.query_planes packs them: uint64 [planes * words]."""
    out[: planes * words] = np.uint64(0)
    half, largest = np.int64(1) << (planes - 1), np.float32(1.1754944e-38)
    for j in range(bits if planes > 1 else 0):
        size = abs(projected[j])
        largest = size if size > largest or size != size else largest
    for j in range(bits):
        p, word, bit = projected[j], j >> 6, np.uint64(j & 63)
        level = np.int64(1) if p >= np.float32(0) else np.int64(0)
        if planes > 1:
            steps = abs(p) / largest * np.float32(half)
            whole = min(np.int64(steps), half - 1) if steps == steps else np.int64(0)
            level = half + whole if level else half - 1 - whole
        for plane in range(planes):
            out[plane * words + word] |= np.uint64((level >> plane) & 1) << bit
