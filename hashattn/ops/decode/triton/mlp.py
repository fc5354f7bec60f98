"""First kernel of an MLP's codes: its hidden layers but for the last ReLU, in parts that the next kernel adds up."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.maps import Map
from hashattn.ops.decode.sizes import blocking
from hashattn.ops.decode.triton.matrix import load_block, load_columns, load_vectors, relu, times


@triton.jit(do_not_specialize=["low_row"])
def hidden_layers(
    x, centre, first, first_bias, last, last_bias, sums, count, T, room, low_row, DIM: tl.constexpr,
    PADDED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    TILE: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (count / TILE, FIRST / SLICE). A program takes SLICE units of the first hidden layer.

    With one hidden layer these are its result. With two they are multiplied with their rows of the second layer's
    matrix: no weight is read twice for a vector, and one sum over all slices is left.

    Args:
        x: [count / T, room, DIM], T rows from low_row on of each; centre: float32 [count / T, DIM], or None.
        first, first_bias: float32 [DIM, FIRST], [FIRST].
        last, last_bias: float32 [FIRST, LAST], [LAST] of the second layer; LAST is 0 without one.
        sums: float32 [1, count, FIRST], or [slices, count, LAST], written.
    """
    rows, low = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * SLICE
    # Weights are asked for before the vectors are there: the kernel before this one does not write them.
    into = load_block(first, 0, low, DIM, FIRST, PADDED, SLICE)
    units = load_columns(first_bias, low, FIRST, SLICE)
    if LAST:
        onward = load_block(last, low, 0, FIRST, LAST, SLICE, WIDTH)
        once = load_columns(last_bias, tl.where(low == 0, 0, LAST), LAST, WIDTH)  # zero in all slices but the first
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # the next kernel has weights to fetch
    units += times(load_vectors(x, centre, rows, count, T, room, low_row, DIM, PADDED, UNIT), into)
    inside = rows[:, None] < count
    if LAST:
        columns = tl.arange(0, WIDTH)[None, :]
        part = times(relu(units), onward) + once
        to = sums + (tl.program_id(1).to(tl.int64) * count + rows[:, None]) * LAST + columns
        tl.store(to, part, mask=inside & (columns < LAST))
    else:
        columns = low + tl.arange(0, SLICE)[None, :]
        tl.store(sums + rows[:, None].to(tl.int64) * FIRST + columns, units, mask=inside & (columns < FIRST))


def run_layers(
    x: Tensor, centre: Tensor | None, by: Map, sums: Tensor, early: dict[str, Any], tokens: int, first: int = 0
) -> None:
    """The last hidden layer of an MLP before its ReLU, in parts to be added up.

    Args:
        x: [B, H, room, D], contiguous, of which so many tokens from the first on are meant.
        centre: float32 [B, H, D], contiguous, subtracted first.
        by: a map with layers.
        sums: float32 [parts, B * H * tokens, width], written: see :func:`hashattn.ops.decode.sizes.layer_parts`.
        early: launch options.
    """
    (_, count, last), dim, width = sums.shape, x.shape[3], by.widths[0]
    two = len(by.widths) == 2
    tile, units, warps = blocking(count)
    second = (by.weights[1], by.biases[1]) if two else (None, None)
    constants = {"DIM": dim, "PADDED": triton.next_power_of_2(dim), "FIRST": width, "LAST": last if two else 0}
    constants |= {"WIDTH": triton.next_power_of_2(last) if two else 1, "SLICE": units, "TILE": tile}
    constants |= {"UNIT": by.unit, "PDL": bool(early)}
    hidden_layers[(triton.cdiv(count, tile), triton.cdiv(width, units))](
        x,
        centre,
        by.weights[0],
        by.biases[0],
        *second,
        sums,
        count,
        tokens,
        x.shape[2],
        first,
        **constants,
        num_warps=warps,
        **early,
    )
