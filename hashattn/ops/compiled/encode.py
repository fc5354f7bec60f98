"""Codes of queries and keys: maps, linear or with an MLP, and signs packed into words."""

from __future__ import annotations

from typing import Any

import numpy as np

from hashattn.ops.compiled.jit import exactly, inlined, signs


@inlined
def project(x: Any, linear: Any, bits: int, out: Any) -> None:
    """x @ linear, float32 [D], [D * bits], to [bits]; and -1 up to a multiple of 64."""
    out[:bits] = np.float32(0)
    out[bits : (bits + 63) // 64 * 64] = np.float32(-1)
    d, p, size = 0, out[:bits], np.uint64(bits)
    while d + 4 <= len(x):
        a, b, c, e = x[d], x[d + 1], x[d + 2], x[d + 3]
        first = np.uint64(d) * size
        second, third, fourth = first + size, first + size + size, first + size + size + size
        for j in range(size):
            p[j] += a * linear[first + j] + b * linear[second + j] + c * linear[third + j] + e * linear[fourth + j]
        d += 4
    while d < len(x):
        a, first = x[d], np.uint64(d) * size
        for j in range(size):
            p[j] += a * linear[first + j]
        d += 1


@inlined
def multiplied(x: Any, rows: int, width: int, weight: Any, size: int, out: Any) -> None:
    """x @ weight is added to out: float32 [rows, width], [width * size], [rows, size], all wider if you like.

    Each weight is read once for all rows.
    """
    d, wide = np.int64(0), np.uint64(size)
    while d + 4 <= width:
        first = np.uint64(d) * wide
        second, third, fourth = first + wide, first + wide + wide, first + wide + wide + wide
        r = np.int64(0)
        while r + 3 <= rows:  # as many as there are registers for
            a, b, c, e = x[r, d], x[r, d + 1], x[r, d + 2], x[r, d + 3]
            f, g, h, i = x[r + 1, d], x[r + 1, d + 1], x[r + 1, d + 2], x[r + 1, d + 3]
            k, l, m, n = x[r + 2, d], x[r + 2, d + 1], x[r + 2, d + 2], x[r + 2, d + 3]  # noqa: E741
            p, q, s = out[r, :size], out[r + 1, :size], out[r + 2, :size]
            for j in range(wide):
                t, u, v, w = weight[first + j], weight[second + j], weight[third + j], weight[fourth + j]
                p[j] += a * t + b * u + c * v + e * w
                q[j] += f * t + g * u + h * v + i * w
                s[j] += k * t + l * u + m * v + n * w
            r += 3
        while r < rows:
            a, b, c, e, p = x[r, d], x[r, d + 1], x[r, d + 2], x[r, d + 3], out[r, :size]
            for j in range(wide):
                p[j] += a * weight[first + j] + b * weight[second + j] + c * weight[third + j] + e * weight[fourth + j]
            r += 1
        d += 4
    while d < width:
        first = np.uint64(d) * wide
        for r in range(rows):
            a, p = x[r, d], out[r, :size]
            for j in range(wide):
                p[j] += a * weight[first + j]
        d += 1


@inlined
def to_unit(x: Any, width: int) -> None:
    """Scale a row, float32 [width], to unit mean square, as Map does."""
    total = np.float32(0)
    for j in range(width):
        total += x[j] * x[j]
    mean = total / np.float32(width)
    scale = np.float32(1) / np.sqrt(np.float32(1e-12) if mean < np.float32(1e-12) else mean)
    for j in range(width):
        x[j] *= scale


@inlined
def rectify(x: Any, width: int) -> None:
    """ReLU of a row, in place; NaN stays."""
    for j in range(width):
        x[j] = np.float32(0) if x[j] < np.float32(0) else x[j]


@exactly
def pack(projected: Any, bits: int, planes: int, words: int, out: Any) -> None:
    """Bit planes of a projection, as ops.hamming.reference.query_planes packs them: uint64 [planes * words].

    projected: float32 [bits] and -1 up to a multiple of 64.
    """
    if planes == 1:
        for word in range(words):
            out[word] = signs(projected, word * 64)
        return
    out[: planes * words] = np.uint64(0)
    half, largest = np.int64(1) << (planes - 1), np.float32(1.1754944e-38)
    for j in range(bits):
        size = abs(projected[j])
        largest = size if size > largest or size != size else largest
    for j in range(bits):
        p, word, bit = projected[j], j >> 6, np.uint64(j & 63)
        steps = abs(p) / largest * np.float32(half)
        whole = min(np.int64(steps), half - 1) if steps == steps else np.int64(0)
        level = half + whole if p >= np.float32(0) else half - 1 - whole
        for plane in range(planes):
            out[plane * words + word] |= np.uint64((level >> plane) & 1) << bit
