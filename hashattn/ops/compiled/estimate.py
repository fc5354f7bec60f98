"""Logits of medium keys, which are not read: from their codes and norms, and a small MLP of both codes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from hashattn.ops.compiled import places as p
from hashattn.ops.compiled.jit import inlined, lying_at, number, popcount
from hashattn.ops.compiled.places import Work


@inlined
def estimate(
    at: Any, a: float, q: Any, query: Any, centre: Any, codes: Any, norms: Any, ids: Any, logits: Any, work: Work
) -> None:
    """A query's logits of the keys at ids, as Estimate says."""
    offset, size, words = np.float32(0), np.float32(0), at[p.WORDS]
    for x in range(at[p.DIM]):
        offset += q[x] * centre[x]
        size += q[x] * q[x]
    size = np.float32(a) * np.sqrt(size)
    each = np.float32(2) / np.float32(at[p.BITS])
    if words == 2:  # most often
        first, second = query[0], query[1]
        for n in range(len(ids)):
            one = np.uint64(ids[n])
            differ = popcount(first ^ codes[one + one]) + popcount(second ^ codes[one + one + np.uint64(1)])
            logits[n] = np.float32(1) - each * np.float32(differ)
    else:
        for n in range(len(ids)):
            one, differ = np.int64(ids[n]), np.uint64(0)
            for w in range(words):
                differ += popcount(query[w] ^ codes[one * words + w])
            logits[n] = np.float32(1) - each * np.float32(differ)
    if at[p.HIDDEN]:
        begin(at, query, work)
        for n in range(len(ids)):
            logits[n] += residual(at, codes[np.int64(ids[n]) * words :], work)
    for n in range(len(ids)):
        logits[n] = offset + size * number(norms[np.uint64(ids[n])]) * logits[n]


@inlined
def tabulate(at: Any, work: Work) -> None:
    """What four bits of a key's code add to the hidden layer, for each of their 16 values: to work.table."""
    hidden, bits, table = at[p.HIDDEN], at[p.BITS], work.table
    key = carray(lying_at(at[p.RESIDUAL + 2], p.FLOAT), hidden * bits)
    weights = work.begun[0]
    for nibble in range((bits + 3) // 4):
        first = nibble * 16 * hidden
        table[first : first + hidden] = np.float32(0)
        for i in range(min(4, bits - nibble * 4)):  # values below 2^i are there
            for j in range(hidden):
                weights[j] = key[j * bits + nibble * 4 + i]
            for value in range(1 << i):
                without = table[first + value * hidden : first + (value + 1) * hidden]
                at_one = first + ((1 << i) + value) * hidden
                with_it = table[at_one : at_one + hidden]
                for j in range(np.uint64(hidden)):
                    with_it[j] = without[j] + weights[j]
                    without[j] -= weights[j]


@inlined
def begin(at: Any, query: Any, work: Work) -> None:
    """What the query adds to the hidden layer, bias and all: to work.begun."""
    hidden, bits = at[p.HIDDEN], at[p.BITS]
    weights = carray(lying_at(at[p.RESIDUAL], p.FLOAT), hidden * bits)
    biases = carray(lying_at(at[p.RESIDUAL + 1], p.FLOAT), hidden)
    for j in range(hidden):
        total = biases[j]
        for i in range(bits):
            weight = weights[j * bits + i]
            total += weight if (query[i >> 6] >> np.uint64(i & 63)) & np.uint64(1) else -weight
        work.begun[0, j] = total


@inlined
def entry(bits: np.uint64, nibble: int, more: int) -> np.uint64:
    """Which of the table's entries four bits of a code are: the `more`-th nibble after one that is lowest."""
    return np.uint64((nibble + more) * 16) + ((bits >> np.uint64(4 * more)) & np.uint64(15))


@inlined
def residual(at: Any, code: Any, work: Work) -> Any:
    """The MLP's output for a key's code."""
    hidden, sums, table = np.uint64(at[p.HIDDEN]), work.begun[1], work.table
    out = carray(lying_at(at[p.RESIDUAL + 3], p.FLOAT), at[p.HIDDEN])
    total = carray(lying_at(at[p.RESIDUAL + 4], p.FLOAT), 1)[0]
    for j in range(hidden):
        sums[j] = work.begun[0, j]
    count, nibble = (at[p.BITS] + 3) // 4, np.int64(0)
    while nibble + 4 <= count:  # as many as LLVM vectorises at once
        four = code[nibble >> 4] >> np.uint64(4 * (nibble & 15))
        a, b = entry(four, nibble, 0) * hidden, entry(four, nibble, 1) * hidden
        c, d = entry(four, nibble, 2) * hidden, entry(four, nibble, 3) * hidden
        for j in range(hidden):
            sums[j] += table[a + j] + table[b + j] + table[c + j] + table[d + j]
        nibble += 4
    while nibble < count:
        first = entry(code[nibble >> 4] >> np.uint64(4 * (nibble & 15)), nibble, 0) * hidden
        for j in range(hidden):
            sums[j] += table[first + j]
        nibble += 1
    for j in range(hidden):
        total += out[j] * max(sums[j], np.float32(0))
    return total
